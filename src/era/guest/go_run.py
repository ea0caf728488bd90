"""How a Go program starts: compiled with the session's files by `go build`, unless that has been done before.

Theory of operation
===================

The program takes the place of main.go, by an overlay if it couldn't have that name. The session is a module: its own
where it has a go.mod, else one called "session". Positions in messages are those of main.go.

What was built is kept in the sandbox's cache, by a hash of all that it is made of, and isn't built again. The hash is
made in the process that becomes the program: no other is started for it. Where it isn't certain what a build reads
(links, replaced modules, workspaces, embedded files, C, variables of Go's that name files) there is no hash, and Go
decides.
"""

from __future__ import annotations

import json
import os
import signal
import time
from _blake2 import blake2b  # hashlib would load OpenSSL

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from typing import NoReturn

_GO = "/opt/go"
_STANDARD_LIBRARY = "/opt/go-std/ready"
_MODULES = "/opt/env-go"
"""What the session's setup brought."""

_USUAL = {"GOFLAGS": "-buildvcs=false -modcacherw", "GOENV": "off", "CGO_ENABLED": "0"}
_UNUSUAL = ("GOROOT", "GOWORK", "GOMODCACHE", "GOTOOLDIR")
_SOURCES = (".go", ".s", ".S", ".sx", ".syso", ".h", ".hh", ".hpp", ".hxx")
"""Endings of what Go reads for a package without C."""

_OF_MODULES = ("go.mod", "go.sum", "modules.txt")
_MOST_BYTES = 16 << 20
"""A larger source isn't read for the hash."""

_KEPT = 4
"""So many programs are kept."""


class _Uncertain(Exception):
    """A build may read what the hash doesn't know of."""


def start(argv: list[str], environment: dict[str, str]) -> NoReturn:
    """Become the program. `argv`: Go's version without its last part, "online" or "offline", the program's file, its
    arguments."""
    version, network, path, *args = argv
    directory = os.getcwd()
    os.chdir(os.path.dirname(path) or ".")  # it may be to start in another directory than its own
    file = os.path.basename(path)
    cache = os.path.dirname(environment["GOCACHE"])
    program = f"{cache}/program"
    key = program_key(file, environment)
    kept = f"{cache}/programs/{key}"
    variables = dict(environment)
    if has_modules := os.path.isdir(_MODULES):
        flags = f"{environment['GOFLAGS']} -mod=mod -modfile={cache}/go.mod"
        variables.update(GOMODCACHE=f"{_MODULES}/mod", GOFLAGS=flags)
    if key is None or not os.path.exists(kept):
        _prepare_cache(environment["GOCACHE"], cache)
        overlay = _overlay(file, version, cache, has_modules=has_modules)
        # Without internet the error should name the missing module, not an address that can't be reached.
        proxy = environment.get("GOPROXY") or ("" if network == "online" and not has_modules else "off")
        _build(program, overlay, {**variables, "HOME": "/nonexistent", "GOMAXPROCS": "2", "GOPROXY": proxy})
        # Unless a process has changed something meanwhile. The cache is memory.
        if key is not None and program_key(file, environment) == key:
            _keep(program, kept)
    elif not os.path.exists(program) or not os.path.samefile(kept, program):
        os.link(kept, f"{kept}.new")
        os.replace(f"{kept}.new", program)
    os.chdir(directory)
    try:
        os.execve(program, [program, *args], {**variables, "PWD": directory})
    except PermissionError:  # of another package Go makes an archive, and nothing to execute
        os.write(2, b"main.go is not of package main\n")
        os._exit(1)  # as `go run` does


def program_key(file: str, environment: dict[str, str]) -> str | None:
    """A hash of all that the program `file` in the working directory is made of; None where that isn't certain."""
    given = {name: value for name, value in environment.items() if name.startswith(("GO", "CGO_"))}
    if any(given.get(name) != value for name, value in _USUAL.items()) or any(map(given.get, _UNUSUAL)):
        return None
    hashed = blake2b(digest_size=32)

    def add(*parts: bytes) -> None:  # at once: all sources together may be more than the program's memory
        for part in parts:
            hashed.update(b"%d " % len(part))
            hashed.update(part)

    add(os.fsencode(file), json.dumps(given, sort_keys=True).encode(), _content(f"{_GO}/VERSION"))
    try:
        if os.path.isdir(_MODULES):
            add(_content(f"{_MODULES}/go.mod"), _content(f"{_MODULES}/go.sum"))
        pending = ["."]
        while pending:
            with os.scandir(pending.pop()) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif entry.is_symlink():
                        raise _Uncertain  # what it leads to may be anywhere
                    elif entry.name.endswith(_SOURCES) or entry.name in _OF_MODULES:
                        add(os.fsencode(entry.path), _source(entry))
                    elif entry.name == "go.work":
                        raise _Uncertain
    except (OSError, _Uncertain):
        return None
    return hashed.hexdigest()


def _source(entry: os.DirEntry[str]) -> bytes:
    """What is in a file that Go reads. Raises OSError, and _Uncertain where that leads to other files."""
    content = _content(entry.path)
    if entry.name == "go.mod":
        if any(line.lstrip().startswith(b"replace") for line in content.split(b"\n")):
            raise _Uncertain
    elif b"go:embed" in content:
        raise _Uncertain
    return content


def _content(path: str) -> bytes:
    """What is in a file, which is no link. Raises OSError, and _Uncertain where that is too much to read."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        content = b""
        while part := os.read(fd, 1 << 20):
            content += part
            if len(content) > _MOST_BYTES:
                raise _Uncertain
        return content
    finally:
        os.close(fd)


def _prepare_cache(build_cache: str, cache: str) -> None:
    """Fill the build cache with links to the standard library, which is compiled."""
    trimmed = f"{build_cache}/trim.txt"
    if os.path.exists(trimmed):
        return
    os.makedirs(build_cache, exist_ok=True)
    os.makedirs(f"{cache}/gopath", exist_ok=True)
    for place, _, names in os.walk(_STANDARD_LIBRARY):
        own = build_cache + place.removeprefix(_STANDARD_LIBRARY)
        os.makedirs(own, exist_ok=True)
        for name in names:
            if name != "trim.txt" and not os.path.lexists(f"{own}/{name}"):
                os.symlink(f"{place}/{name}", f"{own}/{name}")
    _write(trimmed, b"%d" % time.time())  # or Go would go through all of it and throw out what is old


def _overlay(file: str, version: str, cache: str, *, has_modules: bool) -> str:
    """Make the files that the working directory lacks for a build, and the overlay that says what stands for what.
    Returns its path."""
    here = os.getcwd()
    replaced = {} if file == "main.go" else {f"{here}/main.go": f"{here}/{file}"}
    has_own = os.path.exists("go.mod")
    if has_modules:
        # The session's setup brought these. What they add to go.mod and go.sum is nobody's file.
        _write(f"{cache}/go.sum", _read(f"{_MODULES}/go.sum") + (_read("go.sum") if os.path.exists("go.sum") else b""))
        _write(f"{cache}/go.mod", _read("go.mod" if has_own else f"{_MODULES}/go.mod"))
    elif not has_own:
        _write(f"{cache}/go.mod", f"module session\n\ngo {version}\n".encode())
    if not has_own:
        replaced[f"{here}/go.mod"] = f"{cache}/go.mod"
    _write(f"{cache}/overlay.json", json.dumps({"Replace": replaced}).encode())
    return f"{cache}/overlay.json"


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _write(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def _build(program: str, overlay: str, environment: dict[str, str]) -> None:
    """Compile the working directory's package. Ends this process where that can't be."""
    go = f"{_GO}/bin/go"
    command = [go, "build", "-p", "2", "-ldflags=-w", "-overlay", overlay, "-o", program, "."]
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as a shell's, which waits
    pid = os.posix_spawn(go, command, environment, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
    if os.waitpid(pid, 0)[1]:
        os._exit(1)


def _keep(program: str, kept: str) -> None:
    """Keep a program, in place of the oldest of those that are."""
    directory = os.path.dirname(kept)
    os.makedirs(directory, exist_ok=True)
    with os.scandir(directory) as entries:
        others = sorted(entries, key=lambda entry: entry.stat().st_mtime, reverse=True)
    for old in others[_KEPT - 1 :]:
        os.unlink(old.path)
    os.link(program, kept)
