"""Another revision of ERA, beside the working tree: its sources, its own packages, its own service."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from bench.arena import Arena
from bench.cases import Case, Probe, Ratio
from era.languages.preparation import PLACES, READY

ROOT = Path(__file__).resolve().parent.parent

NAMES = ("python warm", "python change", "python burst", "node warm", "python first", "create and run", "eight clients")
"""The cases by which two revisions are compared."""

RIVALS = ("python host", "python host burst", "node host", "two loops")
"""What these cases are compared with besides: what is quick to measure."""


class UnknownRevision(ValueError):
    """Git knows no such revision, or there is no git."""


@contextlib.contextmanager
def installed(revision: str) -> Iterator[Path]:
    """A revision, checked out and installed as its own lock file says, until the block ends: the path of its `era`.
    Raises UnknownRevision, CalledProcessError."""
    commit = _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if not commit:
        raise UnknownRevision(f"git knows no revision '{revision}' here.")
    place = Path(tempfile.mkdtemp(prefix="era-revision-", dir="/var/tmp"))
    tree = place / "tree"
    try:
        subprocess.run(
            ["git", "worktree", "add", "--quiet", "--detach", tree, commit], cwd=ROOT, check=True, capture_output=True
        )
        uv = shutil.which("uv") or ROOT / ".venv" / "bin" / "uv"
        environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
        subprocess.run(
            [uv, "sync", "--locked", "--quiet", "--no-dev", "--extra", "server"],
            cwd=tree,
            check=True,
            env={**environment, "UV_PROJECT_ENVIRONMENT": str(tree / ".venv"), "UV_PYTHON_DOWNLOADS": "never"},
        )
        _prepare(tree / ".venv")
        yield tree / ".venv" / "bin" / "era"
    finally:
        shutil.rmtree(place, ignore_errors=True)
        _git("worktree", "prune")


def _prepare(environment: Path) -> None:
    """Give it what has been prepared for languages here. What has another version there is prepared by its service."""
    here, there = Path(sys.prefix) / PLACES, environment / PLACES
    for ready in here.glob(f"*/{READY}"):
        shutil.copytree(ready, there / ready.relative_to(here), symlinks=True, copy_function=_linked)


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def described() -> str:
    """The commit of the working tree, with a + where something has changed since; "unknown" without git."""
    try:
        return (_git("describe", "--always", "--dirty=+", "--exclude=*") or "unknown")[:40]
    except UnknownRevision:
        return "unknown"


def name_of(case: str, revision: str) -> str:
    return f"{case} @{revision}"


def with_other(
    cases: Sequence[Case], compared: Sequence[str], other: Arena, revision: str
) -> tuple[list[Case], list[Ratio]]:
    """The cases, of which those to be compared are followed by the same on the service of another revision; and how
    they compare."""
    both = []
    for case in cases:
        both.append(case)
        if case.name in compared:
            both.append(_on(case, other, name_of(case.name, revision)))
    return both, [Ratio(name, name_of(name, revision)) for name in compared]


def _on(case: Case, other: Arena, name: str) -> Case:
    """A case under another name, on the service of that arena."""

    def start(_: Arena) -> Probe:
        other.keep_open()
        probe = case.start(other)

        def before() -> object:
            other.keep_open()
            return probe.before()

        return replace(probe, before=before)

    return replace(case, name=name, start=start)


def _git(*arguments: str) -> str:
    """What git says about this repository, nothing where it refuses. Raises UnknownRevision where there is no git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UnknownRevision("git is needed to compare revisions.") from None
    return done.stdout.strip() if done.returncode == 0 else ""
