"""The tests of well-known packages, in a session and outside as an ordinary user: each goes the same.

They are fetched from the index that pip and uv of this machine use. Packages of npm come without their tests: those of
express and commander have no suite in those looked at (commander 0.6, 1.0, 2.0 and 14, express 2.5, 3.0, 4.0
and 5). zod's has some since version 4, as sources of TypeScript for a test runner that it doesn't bring.
"""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from era.drivers import guest
from era.packages.tools import uv_binary
from tests.api.plain_interpreter import PLAIN_ENVIRONMENT
from tests.api.setups import make, settled
from tests.api.test_plain_machine import DIFFERENT, NOBODY

pytestmark = pytest.mark.soak

SECONDS = 1800
SOURCE = "source.tar.gz"
LIMITS = {"memory_mb": 1024, "pids": 200}

type Outcomes = dict[str, str]
"""By name of the test, how it went: the kind of what pytest has to say of it, empty where it passed."""


@dataclass(frozen=True)
class Suite:
    """What to install, and which tests to run."""

    requirements: str
    """The package with its version first."""

    tests: str = "tests"
    """pytest's arguments."""

    has_source: bool = True
    """Whether the tests are in the package's source distribution, and not in the wheel."""

    @property
    def script(self) -> str:
        """Runs them, with the source unpacked into the working directory."""
        return f"python3 -m pytest -q -p no:cacheprovider --junit-xml result.xml {self.tests}"


SUITES = {
    "attrs": Suite("attrs==26.1.0 pytest hypothesis cloudpickle pympler pytest-xdist"),
    "click": Suite("click==8.5.1 pytest"),
    "flask": Suite("flask==3.1.3 pytest<9 python-dotenv asgiref"),
    "jinja2": Suite("jinja2==3.1.6 pytest trio"),
    "requests": Suite("requests==2.34.2 pysocks pytest pytest-httpbin pytest-mock trustme httpbin"),
    "numpy": Suite("numpy pytest hypothesis", "-m 'not slow' --pyargs numpy.lib numpy.linalg", has_source=False),
}

_TIMEOUTS = ("test_connect_timeout", "test_total_timeout_connect")
KNOWN = {
    "tests.test_format::test_large_file_support": "The size of a file",
    # They connect to a private address, which is closed, and so fails at once.
    **{
        f"tests.test_requests.TestTimeout::{name}[timeout{at}]": "Kinds of sockets"
        for name in _TIMEOUTS
        for at in (0, 1)
    },
}
"""Tests that go differently, and the entry of the list in `docs/languages.md` that says why."""


def outside(directory: Path, suite: Suite) -> Outcomes:
    """Run the tests in a virtual environment. Leaves the source as SOURCE, if the suite has one."""
    user = NOBODY if os.geteuid() == 0 else None
    venv, work = directory / "venv", directory / "work"
    work.mkdir()
    uv = [str(uv_binary())]
    subprocess.run([*uv, "venv", "-q", "--python", guest.PYTHON, str(venv)], check=True)
    install = [*uv, "pip", "install", "-q", "--python", str(venv), "pip", *suite.requirements.split()]
    subprocess.run(install, check=True, timeout=SECONDS)
    if suite.has_source:
        pinned = suite.requirements.split()[0]
        # Of this one only: what builds its metadata may come as wheels.
        fetch = ["download", "-q", "--no-deps", "--no-binary", pinned.partition("==")[0], "-d", str(directory), pinned]
        subprocess.run([f"{venv}/bin/python", "-m", "pip", *fetch], check=True, timeout=SECONDS)
        (fetched,) = directory.glob("*.tar.gz")
        with tarfile.open(fetched) as archive:
            archive.extractall(directory, filter="data")
        (unpacked,) = (path for path in directory.iterdir() if path.is_dir() and path not in (venv, work))
        work.rmdir()
        unpacked.rename(work)
        with tarfile.open(directory / SOURCE, "w:gz") as archive:
            archive.add(work, ".")
    if user is not None:
        subprocess.run(["chown", "-R", str(user), str(work)], check=True)
    path = f"{venv}/bin:{PLAIN_ENVIRONMENT['PATH']}"
    subprocess.run(
        ["sh", "-c", suite.script], cwd=work, env={**PLAIN_ENVIRONMENT, "PATH": path}, user=user, group=user,
        extra_groups=None if user is None else [], start_new_session=True, timeout=SECONDS, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return outcomes((work / "result.xml").read_bytes())


def inside(client: httpx.Client, directory: Path, suite: Suite) -> Outcomes:
    where = make(client, {"pip": {"requirements": suite.requirements}}, limits=LIMITS, isolation="bubblewrap")
    settled(client, where)
    if suite.has_source:
        source = (directory / SOURCE).read_bytes()
        answer = client.put(
            f"/api/sessions/{where}/archive", content=source, headers={"Content-Type": "application/gzip"}
        )
        assert answer.status_code == 200, answer.text
    body = {"command": suite.script, "timeout": SECONDS}
    ran = client.post(f"/api/sessions/{where}/run", json=body, timeout=SECONDS + 60).json()
    result = client.get(f"/api/sessions/{where}/files/result.xml")
    assert result.status_code == 200, ran
    return outcomes(result.content)


def outcomes(report: bytes) -> Outcomes:
    """How each test went, from pytest's report in JUnit's format."""
    found: Outcomes = {}
    for case in ET.fromstring(report).iter("testcase"):
        # Some have an address or a path of the machine in their names.
        name = re.sub(r"0x[0-9a-f]+|/\S*/", "", f"{case.get('classname')}::{case.get('name')}")
        found[name] = " ".join(part.tag for part in case if part.tag in ("failure", "error", "skipped"))
    return found


@pytest.mark.parametrize("name", SUITES)
def test_they_go_as_outside(client: httpx.Client, host_directory: Path, name: str) -> None:
    expected = outside(host_directory, SUITES[name])
    assert sum(not outcome for outcome in expected.values()) > 50, "next to nothing was tested"
    for _ in range(3):  # some depend on how busy the machine is
        found = inside(client, host_directory, SUITES[name])
        differ = {
            each for each in expected.keys() | found.keys() if expected.get(each) != found.get(each)
        } - KNOWN.keys()
        if not differ:
            break
    assert {each: (expected.get(each), found.get(each)) for each in differ} == {}


def test_what_goes_differently_is_listed() -> None:
    assert set(KNOWN.values()) <= DIFFERENT.keys()
