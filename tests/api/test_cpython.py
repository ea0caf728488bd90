"""Python's own tests, in a session and outside as an ordinary user: none goes differently inside, except for what
`docs/languages.md` lists."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import httpx
import pytest

from era.drivers import guest
from tests.api import cpython
from tests.api.plain_interpreter import PLAIN_ENVIRONMENT, python
from tests.api.test_plain_machine import DIFFERENT, NOBODY
from tests.conftest import MakeSession

_FOUND = subprocess.run(
    [guest.PYTHON, "-c", "import test.test_os; print(test.__path__[0])"], capture_output=True, text=True
)
_HAS_TESTS, _TESTS = not _FOUND.returncode, _FOUND.stdout.strip()

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        not _HAS_TESTS, reason=f"{guest.PYTHON} lacks its tests; on Debian: apt-get install libpython3.13-testsuite"
    ),
]

MODULES = (
    *(
        "test_asyncio.test_subprocess",
        "test_fcntl",
        "test_fileio",
        "test_getpass",
        "test_glob",
        "test_grp",
        "test_import",
    ),
    *("test_io", "test_json", "test_locale", "test_logging", "test_mmap", "test_multiprocessing_fork", "test_openpty"),
    *("test_os", "test_pathlib", "test_pickle", "test_posix", "test_pty", "test_pwd", "test_resource", "test_runpy"),
    *("test_select", "test_selectors", "test_shutil", "test_signal", "test_site", "test_socket", "test_sqlite3"),
    *("test_ssl", "test_subprocess", "test_tarfile", "test_tempfile", "test_termios", "test_threading", "test_time"),
    *("test_uuid", "test_venv", "test_wait4", "test_zipfile", "test_zipimport"),
)
NOT_COMPARED = {
    *("test_asyncio", "test_bigaddrspace", "test_bigmem", "test_capi", "test_cext", "test_concurrent_futures"),
    *("test_cppext", "test_curses", "test_embed", "test_free_threading", "test_gdb", "test_idle"),
    *("test_largefile", "test_multiprocessing_forkserver", "test_multiprocessing_spawn"),
    *("test_peg_generator", "test_perf_profiler", "test_perfmaps", "test_pydoc", "test_pyrepl", "test_regrtest"),
    *("test_string_literals", "test_tkinter", "test_tomllib", "test_tools", "test_ttk", "test_turtle", "test_unittest"),
    *("test_warnings", "test_winreg", "test_zipfile64", "test_zoneinfo"),
}
"""They take long or much memory, need what Debian doesn't package, or haven't been looked at."""

KNOWN = {
    r"Read-only file system": "Files of the system",
    r"test___all__\.AllTest\.test_all: .*FileNotFoundError": "`/etc`",  # Debian's sitecustomize.py is a link to there
    r"test_external_inspection\.": "Tracing",
    r"test_mmap\.LargeMmapTests\.|test_resource\.ResourceTest\.test_fsize_ismax": "The size of a file",
    r"test_os\.MakedirTests\.test_exist_ok_s_isgid_directory": "Set-user-ID bits",
    r"test_resource\.ResourceTest\.test_prlimit:": "Limits of other processes",
    r"test_site\.(HelperFunctionsTests\.test_s_option|StartupImportTests\.test_startup_imports)": "Python's prefix",
    r"test_socket\.\w*UDPLITE.*Protocol not supported": "Kinds of sockets",
    r"test_subprocess\.POSIXProcessTestCase\.test_(user|group):": "Users",
    r"test_tarfile\.TestExtractionFilters\.test_modes": "Set-user-ID bits",
    r"test_uuid\.\w+\.test_(ip|ifconfig)_getnode": "Kinds of sockets",
}
"""What of tests goes differently, searched for in their name and outcome inside, and the entry of the document's list
that says why."""


def others() -> list[str]:
    """The modules besides MODULES, by name."""
    found = Path(_TESTS).glob("test_*") if _HAS_TESTS else ()
    return sorted({path.stem for path in found if path.suffix in ("", ".py")} - set(MODULES) - NOT_COMPARED)


def inside(client: httpx.Client, where: str, module: str) -> dict[str, str]:
    """How a module's tests go in a session."""
    body = {"code": Path(cpython.__file__).read_text(), "args": [module], "timeout": 600}
    answer = client.post(f"/api/sessions/{where}/run", json=body, timeout=660).json()
    assert answer["exit_code"] == 0, answer
    outcomes: dict[str, str] = json.loads(answer["stdout"])
    return outcomes


def outside(directory: Path, module: str) -> dict[str, str]:
    """The same on this machine, as an ordinary user."""
    user = NOBODY if os.geteuid() == 0 else None
    if user is not None:
        os.chown(directory, user, user)
    (directory / "main.py").write_text(Path(cpython.__file__).read_text())
    done = subprocess.run(
        [python(), "main.py", module], cwd=directory, env=PLAIN_ENVIRONMENT, user=user, group=user,
        extra_groups=None if user is None else [], capture_output=True, text=True, start_new_session=True, timeout=600,
        stdin=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    outcomes: dict[str, str] = json.loads(done.stdout)
    return outcomes


@pytest.mark.parametrize("module", MODULES)
def test_its_tests_go_as_outside(client: httpx.Client, session: MakeSession, host_directory: Path, module: str) -> None:
    expected = outside(host_directory, module)
    differ: set[str] | None = None
    for _ in range(3):  # some depend on how busy the machine is, so they fail now and then wherever they are
        found = inside(client, session(isolation="bubblewrap"), module)
        here = {
            name
            for name in expected.keys() | found.keys()
            if kind(expected, name) != kind(found, name) and not is_known(name, found)
        }
        differ = here if differ is None else differ & here
        if not differ:
            break
    assert {name: (expected.get(name), found.get(name)) for name in differ or set()} == {}


@pytest.mark.parametrize("module", others())
def test_nothing_fails_only_inside(
    client: httpx.Client, session: MakeSession, host_directory: Path, module: str
) -> None:
    """What goes well outside does so inside. The other way round, some tests want files that another user owns here."""
    worse: dict[str, str | None] = {}
    for _ in range(2):  # some depend on how busy the machine is, so they fail now and then wherever they are
        expected = outside(host_directory, module)
        found = inside(client, session(isolation="bubblewrap", limits={"memory_mb": 1024}), module)
        passed = [name for name in expected if kind(expected, name) == "ok" and not is_known(name, found)]
        worse = {name: found.get(name) for name in passed if kind(found, name) != "ok"}
        if not worse:
            break
    assert worse == {}


def is_known(name: str, found: dict[str, str]) -> bool:
    """Whether the list says why a test goes as it does inside."""
    return any(re.search(pattern, f"{name}: {found.get(name)}") for pattern in KNOWN)


def kind(outcomes: dict[str, str], name: str) -> str:
    """How a test went, without the details."""
    return outcomes.get(name, "absent").partition(":")[0]


def test_what_goes_differently_is_listed() -> None:
    assert set(KNOWN.values()) <= DIFFERENT.keys()
