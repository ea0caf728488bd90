"""Packages: the first session that asks for some, the next one, and what many packages cost a run.

ERA and the tools by hand ask the same registries, each with a cache of its own. A `cold` cache is empty, a `warm` one
has the packages. ERA's own package sets are removed before each call, so that each call is that of a first session.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable

from bench.arena import Arena
from bench.cases import Probe
from era.drivers import guest
from era.languages.node import NODE
from era.packages import tools

type Setup = dict[str, list[str]]

FIRST = {"requests": "pip", "axios": "npm"}
_SMALL = {"pip": "six", "npm": "ms"}
"""Packages for a small arena."""

_LARGE: dict[str, Setup] = {
    "python": {"pip": ["pandas"]},
    "node": {"npm": ["date-fns", "core-js", "rxjs", "lodash"]},  # more than 10,000 files
}
_FEW: dict[str, Setup] = {"python": {"pip": ["idna"]}, "node": {"npm": ["is-number"]}}


def first(name: str, *, cold: bool) -> Callable[[Arena], Probe]:
    """Creating the first session that asks for a package, until its setup has ended."""

    def start(arena: Arena) -> Probe:
        kind, package = FIRST[name], _package(arena, name)
        setup, installed = {kind: [package]}, arena.data_dir / "environments"
        cache = arena.data_dir / "cache" / ("uv" if kind == "pip" else "npm")
        if not cold:
            arena.delete_session(_ready(arena, setup))

        def before() -> None:
            for note in (installed / "asked").iterdir():
                digest = json.loads(note.read_text())["environment"]
                lock = json.loads((installed / digest / "lock.json").read_text())
                while (installed / digest / "uncompiled").exists():  # compiling goes on after the setup
                    time.sleep(0.01)
                if package in {item["name"] for item in (*lock["pip"], *lock["npm"])}:
                    shutil.rmtree(installed / digest)
                    note.unlink()
            if cold:
                shutil.rmtree(cache, ignore_errors=True)  # it may not be there yet

        return Probe(lambda _: _ready(arena, setup), before, arena.delete_session)

    return start


def by_hand(name: str, *, cold: bool, options: tuple[str, ...] = ()) -> Callable[[Arena], Probe]:
    """Installing the package with uv or npm itself, into a new directory."""

    def start(arena: Arena) -> Probe:
        directory = arena.scratch / " ".join((name, "cold" if cold else "warm", *options))
        home, target, cache = directory / "home", directory / "target", directory / "cache"
        home.mkdir(parents=True)
        environment = tools.environment(home, str(home), os.environ)
        if FIRST[name] == "pip":
            command = [str(tools.uv_binary()), "pip", "install", "--python", guest.PYTHON, "--target", str(target)]
            command += ["--cache-dir", str(cache), *options, _package(arena, name)]
        else:
            node = guest.MOUNTS[NODE]
            command = [str(node / "bin/node"), str(node / "lib/node_modules/npm/bin/npm-cli.js"), "install"]
            command += ["--no-audit", "--no-fund", "--prefix", str(target), "--cache", str(cache)]
            command.append(_package(arena, name))

        def before() -> None:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            if cold:
                shutil.rmtree(cache, ignore_errors=True)

        def call() -> None:
            subprocess.run(command, env=environment, cwd=target, check=True, capture_output=True)

        if not cold:
            before()
            call()
        return Probe(lambda _: call(), before)

    return start


def again(arena: Arena) -> Probe:
    """Creating a session with packages that another session has, until its setup has ended."""
    setup = _FEW["python"]
    _ready(arena, setup)
    return Probe(lambda _: _ready(arena, setup), after=arena.delete_session)


def run_beside_packages(language: str, code: str) -> Callable[[Arena], Probe]:
    """A warm run in a session that has packages and imports none of them."""

    def start(arena: Arena) -> Probe:
        setup = (_FEW if arena.small else _LARGE)[language]
        session = _ready(arena, setup, language)
        arena.check_run(arena.run(session, code))
        return Probe(lambda _: arena.run(session, code), after=arena.check_run)

    return start


def _package(arena: Arena, name: str) -> str:
    return _SMALL[FIRST[name]] if arena.small else name


def _ready(arena: Arena, setup: Setup, language: str = "python") -> str:
    """Create a session and wait until its setup has ended. Return its id. Raises RuntimeError if the setup fails."""
    session = arena.check_created(arena.post("/api/sessions", {"language": language, "setup": setup}))
    status, events = arena.get(f"/api/sessions/{session}/setup/events")  # ends with the setup
    if status != 200 or b'"setup_status":"completed"' not in events.replace(b" ", b""):
        raise RuntimeError(f"A setup went wrong: {events!r}")
    return session
