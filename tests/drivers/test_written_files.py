"""Files that a supervisor writes in the place of whatever is there."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from era.errors import SandboxFailed
from tests.conftest import opened
from tests.drivers.conformance.test_names_in_the_way import STATE_FILE, runs_beside_swaps
from tests.drivers.sandboxes import Sandboxes, Weakness
from tests.gvisor import needs_gvisor

GUEST = Path(__file__).resolve().parents[2] / "src/era/guest"


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """The supervisor's modules `workspace` and `fresh_files`, in an empty working directory."""
    monkeypatch.syspath_prepend(str(GUEST))
    monkeypatch.chdir(tmp_path)
    import fresh_files
    import workspace

    yield workspace, fresh_files
    for name in ("fresh_files", "workspace"):
        sys.modules.pop(name, None)  # their own names inside a sandbox


@pytest.fixture
def workspace(modules: tuple[Any, Any]) -> Any:
    return modules[0]


@pytest.fixture
def fresh_files(modules: tuple[Any, Any]) -> Iterator[Any]:
    """Two files that are made ahead."""
    made = modules[1].FreshFiles(2)
    made.prepare()
    yield made
    for fd in (*made._made, *made._replaced):
        os.close(fd)


WAYS = ["in the run", "made ahead", "no files without a name", "no names for files without one"]


@pytest.fixture(params=WAYS)
def write(workspace: Any, fresh_files: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """A function that writes a file of a run; for each way and each kind of file system."""
    if request.param == WAYS[0]:
        return workspace.write_file
    if request.param == WAYS[2]:
        for fd in fresh_files._made:
            os.close(fd)
        fresh_files._made.clear()
        monkeypatch.setattr(os, "open", _without_tmpfile(os.open))
        fresh_files.prepare()
    if request.param == WAYS[3]:
        monkeypatch.setattr(os, "link", _without_proc(os.link))
    return fresh_files.write


def _without_proc(real: Callable[..., None]) -> Callable[..., None]:
    def refusing(source: str, *rest: str, **options: int) -> None:
        if str(source).startswith("/proc/"):
            raise OSError(errno.EXDEV, "no such files here")
        real(source, *rest, **options)

    return refusing


def _without_tmpfile(real: Callable[..., int]) -> Callable[..., int]:
    def refusing(path: str, flags: int, *rest: int, **options: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "this file system can't")
        return real(path, flags, *rest, **options)

    return refusing


def test_nothing_is_seen_of_files_that_are_made_ahead(fresh_files: Any) -> None:
    assert len(fresh_files._made) == 2
    assert os.listdir() == []


def test_written_files_are_plain_and_have_their_content(write: Any) -> None:
    written = {f"{n}.txt": f"content {n}".encode() for n in range(5)}  # more than are made ahead
    for name, content in written.items():
        ino, size, mtime_ns = write(name, content)
        found = os.lstat(name)
        assert (found.st_ino, found.st_size, found.st_mtime_ns) == (ino, size, mtime_ns)
        assert (stat.S_IFMT(found.st_mode), found.st_mode & 0o777, found.st_nlink) == (stat.S_IFREG, 0o644, 1)
    assert {name: Path(name).read_bytes() for name in os.listdir()} == written


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
def test_what_was_there_before_is_replaced(write: Any, before: Callable[[Path], None]) -> None:
    before(Path("name"))
    write("name", b"new")
    found = os.lstat("name")
    assert (stat.S_IFMT(found.st_mode), found.st_nlink, Path("name").read_bytes()) == (stat.S_IFREG, 1, b"new")
    if (elsewhere := Path("elsewhere")).exists():
        assert elsewhere.read_text() == "elsewhere"


def test_who_has_the_old_file_open_keeps_it(write: Any, fresh_files: Any) -> None:
    write("name", b"first")
    with open("name", "rb") as first:
        for n in range(4):
            write("name", b"%d" % n)
            fresh_files.prepare()
            assert (first.read(), Path("name").read_bytes()) == (b"first", b"%d" % n)
            first.seek(0)


def test_a_large_file_that_is_replaced_takes_no_room_from_the_run(fresh_files: Any) -> None:
    Path("name").write_bytes(bytes(1 << 20))
    with open("name", "rb") as file:
        fresh_files.write("name", b"small")
        held = {os.stat(f"/proc/self/fd/{fd}").st_ino for fd in fresh_files._replaced}
        assert os.fstat(file.fileno()).st_ino not in held


def test_descriptors_do_not_grow_in_number(fresh_files: Any, tmp_path: Path) -> None:
    def run() -> int:
        for name in ("main.py", "state.json"):
            fresh_files.write(name, b"content")
        fresh_files.prepare()
        os.unlink("main.py")
        return opened(tmp_path)

    run()
    assert run() == run() == run()


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
    workspace: Any, write: Any, monkeypatch: pytest.MonkeyPatch, put: Callable[[Path], None]
) -> None:
    race(workspace, monkeypatch, put, 3)
    write("name", b"new")
    assert (Path("name").is_symlink(), Path("name").read_bytes()) == (False, b"new")
    assert set(os.listdir()) <= {"name", "elsewhere"}


def test_error_names_what_a_process_keeps_putting_there(
    workspace: Any, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_directory(Path("name"))
    race(workspace, monkeypatch, a_directory, 1000)
    with pytest.raises(FileExistsError, match="a process keeps putting a directory there"):
        write("name", b"new")
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
