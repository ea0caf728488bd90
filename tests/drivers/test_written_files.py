"""Files that a supervisor writes in the place of whatever is there."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from era.errors import SandboxFailed
from tests.drivers.conformance.test_names_in_the_way import STATE_FILE, runs_beside_swaps
from tests.drivers.sandboxes import Sandboxes, Weakness
from tests.gvisor import needs_gvisor

GUEST = Path(__file__).resolve().parents[2] / "src/era/guest"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The supervisor's module of that name, in an empty working directory."""
    monkeypatch.syspath_prepend(str(GUEST))
    monkeypatch.chdir(tmp_path)
    import workspace as module

    yield module
    sys.modules.pop("workspace", None)  # its own name inside a sandbox


def test_a_written_file_is_plain_and_has_its_content(workspace: Any) -> None:
    ino, size, mtime_ns = workspace.write_file("name", b"content")
    found = os.lstat("name")
    assert (found.st_ino, found.st_size, found.st_mtime_ns) == (ino, size, mtime_ns)
    assert (stat.S_IFMT(found.st_mode), found.st_mode & 0o777, found.st_nlink) == (stat.S_IFREG, 0o644, 1)
    assert (os.listdir(), Path("name").read_bytes()) == (["name"], b"content")


def a_file(path: Path) -> None:
    path.write_text("old")


def a_closed_file(path: Path) -> None:
    path.write_text("old")
    path.chmod(0)


def a_link(path: Path) -> None:
    path.with_name("elsewhere").write_text("elsewhere")
    path.symlink_to("elsewhere")


def a_file_with_two_names(path: Path) -> None:
    path.with_name("elsewhere").write_text("elsewhere")
    path.hardlink_to("elsewhere")


def a_directory(path: Path) -> None:
    (path / "below").mkdir(parents=True)
    (path / "below" / "file").write_text("old")


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("before", [a_file, a_closed_file, a_link, a_file_with_two_names, a_directory, a_pipe])
def test_what_was_there_before_is_replaced(workspace: Any, before: Callable[[Path], None]) -> None:
    before(Path("name"))
    workspace.write_file("name", b"new")
    found = os.lstat("name")
    assert (stat.S_IFMT(found.st_mode), found.st_nlink, Path("name").read_bytes()) == (stat.S_IFREG, 1, b"new")
    if (elsewhere := Path("elsewhere")).exists():
        assert elsewhere.read_text() == "elsewhere"


def test_who_has_the_old_file_open_keeps_it(workspace: Any) -> None:
    workspace.write_file("name", b"first")
    with open("name", "rb") as first:
        workspace.write_file("name", b"second")
        assert (first.read(), Path("name").read_bytes()) == (b"first", b"second")


def race(workspace: Any, monkeypatch: pytest.MonkeyPatch, put: Callable[[Path], None], times: int) -> None:
    """Have `put` called after each of the first removals, as by a process."""
    remove, removed = workspace.remove, []

    def racing(path: str) -> None:
        remove(path)
        removed.append(path)
        if len(removed) <= times:
            Path("elsewhere").unlink(missing_ok=True)
            put(Path(path))

    monkeypatch.setattr(workspace, "remove", racing)


@pytest.mark.parametrize("put", [a_link, a_directory, a_pipe])
def test_what_is_put_there_meanwhile_is_replaced(
    workspace: Any, monkeypatch: pytest.MonkeyPatch, put: Callable[[Path], None]
) -> None:
    race(workspace, monkeypatch, put, 3)
    workspace.write_file("name", b"new")
    assert (Path("name").is_symlink(), Path("name").read_bytes()) == (False, b"new")
    assert set(os.listdir()) <= {"name", "elsewhere"}


def test_error_names_what_a_process_keeps_putting_there(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a_directory(Path("name"))
    race(workspace, monkeypatch, a_directory, 1000)
    with pytest.raises(FileExistsError, match="a process keeps putting a directory there"):
        workspace.write_file("name", b"new")
    assert os.listdir() == ["name"]


DIES = {
    "_TRIES = 100": "_TRIES = 1",
    "problem.errno not in _MEDDLING": "True",
}
PANICS = {
    'made = os.path.join(os.path.dirname(path), f".{os.urandom(8).hex()}")': "made = path; remove(path)",
    "            os.unlink(made)\n        except": "            pass\n        except",
    "os.rename(made, path)  # in the place": "pass  # in the place",
}


@pytest.mark.parametrize(
    ("driver", "weakness"), [("bubblewrap", DIES), pytest.param("gvisor", PANICS, marks=needs_gvisor)]
)
def test_a_sandbox_would_die_of_a_state_file_that_is_swapped(
    tmp_path: Path, driver: str, weakness: dict[str, str]
) -> None:
    """conformance/test_names_in_the_way.py has the attack on sound sandboxes."""
    made = Sandboxes(tmp_path / "weak", Weakness(supervisor=weakness), driver, self_tested=())
    try:
        sandbox = made.make()
        assert made.run(sandbox, "print('well')").stdout == "well\n"
        with pytest.raises((SandboxFailed, AssertionError)):
            made.do(sandbox, runs_beside_swaps, STATE_FILE, ("pipe", "link", "socket", "directory"), 1000)
    finally:
        made.stop()
