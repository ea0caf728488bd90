"""Package sets: installed packages, made once and shared read-only by every session that asks for the same.

Theory of operation
===================

*Where.* `environments/DIGEST/` has `python/` (a user's base directory, as Python's site module knows it),
`node_modules/`, for Go `go/` (a cache of modules, and the go.mod and go.sum that name them), and `lock.json`. The
digest is that of an archive of all this (archives.py), so equal packages are there once, and a directory of that name
is complete and never changes. The archive lies in the blob store; a directory that isn't here is made from it again.
`environments/asked/` tells for a list of requirements which package set it came to; that is what makes the same setup
quick, and lets it work without any network.

*Making.* Tools write into a scratch directory, as users of no other right (processes.py). uv takes wheels only, npm
runs no scripts and `go get` builds nothing, so all of them only unpack. Where that won't do, what must run code runs in
a sandbox of the session that asked (building.py), and what it left is moved here. Then the scratch directory is looked
at (trees.py), packed, compiled by a user who has nothing else, synced, and renamed to its place. The archive is durable
before that, and both are before a note or a row names them. What a crash leaves is a scratch directory, and those are
removed at the start, or a blob that nothing names.

*Bytecode.* Compiling a few packages takes longer than fetching them, and a program that begins meanwhile compiles for
itself what it imports. So where there isn't much to compile, that is done on a copy once the package set is in its
place, and added to it. Until then there is a mark, and a package set with a mark is made again from its archive should
the service end. Where there is much, nobody should have to wait for it in a run: that is compiled before.

*Whose.* What was only unpacked is everybody's. What was built was made by code of strangers, which could make it
anything: it is the session's own, and so are the note and, since its lock says so, the digest.

*No code at start.* Python runs lines of `.pth` files in a site directory, and modules named sitecustomize and
usercustomize, before any program. They are left out: what is installed runs when it is imported.

*Going.* A package set that no session names is removed after a while. Being found for a setup counts as new, so one
isn't removed between the moment it was found and the one when a row names it. Its blob is kept as long as the directory
is here or a row names it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import sysconfig
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from era.core.files.durable import sync_file_system
from era.core.files.snapshots import BlobStore
from era.core.models import JsonObject
from era.core.setup.builds import Build
from era.core.setup.package_sets import PackageSet, SetupFailed
from era.core.setup.progress import LAST_WORDS, Say
from era.core.setup.requirements import Packages
from era.core.turns import Turns
from era.packages import archives, building, tools, trees
from era.packages.building import MustBuild
from era.packages.processes import Processes, Space, size_of

_DIGEST = re.compile("[0-9a-f]{64}")
_AT_START = re.compile(r".*\.pth|(usercustomize|sitecustomize)(\..*)?")
"""Names in a site directory that Python acts upon by itself."""

_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
_SITE = f"lib/python{_VERSION}/site-packages"
_COMPILE_SECONDS = 120.0
_MANY_BYTES = 16 << 20
"""With less to compile, nobody waits for that, and a process for each processor would take longer than it saves."""

_UNCOMPILED = "uncompiled"
"""The mark, beside the lock."""

_AT_A_TIME = 2
"""Tools that work on the host. What runs in sandboxes isn't in their way."""

_FORMAT = 2


@dataclass(slots=True)
class _Making:
    """A package set on its way. `deadline` is of the monotonic clock."""

    scratch: Path
    deadline: float
    say: Say | None
    environment: Mapping[str, str]
    """Of the tools."""

    stdout: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)
    npm: list[JsonObject] = field(default_factory=list)
    """What is in node_modules."""

    built_for: str | None = None
    """Whose it is, once some of it was built."""


class PackageInstaller:
    """An Installer in `directory`, which is the service's data directory. `open` before anything."""

    def __init__(
        self,
        directory: Path,
        blobs: BlobStore,
        *,
        python: str,
        python_prefix: Path | None,
        node: Path,
        go: Path | None,
        seconds: float,
        most_bytes: int,
        most_files: int,
        variables: Mapping[str, str],
    ) -> None:
        """`python` is the interpreter that sandboxes run and `python_prefix` what it needs, if that isn't in /usr;
        `node` is the directory of Node's wheel, `go` that of Go's if there is one;
        `variables` are those of the service itself."""
        self.package_sets = directory / "environments"
        self._asked = self.package_sets / "asked"
        self._making = self.package_sets / "making"
        self._cache = directory / "cache"
        self._seconds = seconds
        self._most_bytes = most_bytes
        self._most_files = most_files
        self._variables = variables
        self._blobs = blobs
        self._turns = Turns()
        self._slots = asyncio.Semaphore(_AT_A_TIME)
        self._at_work = 0
        self._compiling: set[asyncio.Task[None]] = set()
        self._clearing: set[asyncio.Task[None]] = set()
        shown = {"cache": self._cache, "uv": tools.uv_binary(), "node": node}
        self._python, self._prefix = python, python_prefix
        if go is not None:
            shown["go"] = go
        self._go = go
        if python_prefix is not None:
            shown["python"] = python_prefix
        self._processes = Processes(directory, shown)
        self._runtimes = {
            "python": f"{sys.implementation.name} {_VERSION} {sysconfig.get_platform()}",
            "node": (node / "include/node/node_version.h").read_text()[:2000] if node.exists() else "",
            "go": (go / "VERSION").read_text()[:2000] if go else "",
        }

    def open(self) -> None:
        """Make the directories, and remove what a killed process left half made."""
        trees.remove(self._making)
        for directory, mode in ((self.package_sets, 0o711), (self._making, 0o700), (self._asked, 0o700)):
            directory.mkdir(mode=mode, parents=True, exist_ok=True)
            directory.chmod(mode)
        for digest in self.digests():
            if (self.package_sets / digest / _UNCOMPILED).exists():
                trees.remove(self.package_sets / digest)
        self._open_cache()

    async def stop(self) -> None:
        """End the compiling that goes on: it is done when a package set is made again."""
        for task in self._compiling:
            task.cancel()
        await asyncio.gather(*self._compiling, return_exceptions=True)
        await self.at_rest()

    async def at_rest(self) -> None:
        """Wait until nothing goes on any more for package sets that are made."""
        while going_on := [*self._compiling, *self._clearing]:  # what ends may leave something to clear away
            await asyncio.gather(*going_on)

    def known(self, packages: Packages, owner: str) -> PackageSet | None:
        for key in (self._key(packages), self._key(packages, owner)):
            try:
                note = json.loads((self._asked / key).read_text())
                found = self.get(note["environment"])
                if found is not None:
                    os.utime(self.package_sets / found.digest)
                    return replace(found, stdout=note["stdout"], stderr=note["stderr"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return None

    def get(self, digest: str) -> PackageSet | None:
        try:
            lock = json.loads((self.package_sets / digest / archives.LOCK).read_text())
            return PackageSet(digest, lock["pip"], lock["npm"], go=lock["go"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def digests(self) -> set[str]:
        return {name for name in os.listdir(self.package_sets) if _DIGEST.fullmatch(name)}

    async def make(self, packages: Packages, build: Build, *, anew: bool, say: Say | None = None) -> PackageSet:
        key = self._key(packages)
        try:
            async with self._turns.take(key, bounded=False):
                if not anew and (found := self.known(packages, build.owner)) is not None:
                    return found
                made = await self._in_scratch(lambda scratch: self._made(packages, scratch, say))
                self._note(key, made)
                return made
        except MustBuild as must:
            if say is not None:
                say("stdout", b"Some of it has to run code to be installed. That is done in a sandbox.\n")
            kind = must.kind
        # Nobody waits for this, however long it takes.
        made = await self._in_scratch(lambda scratch: self._made(packages, scratch, say, build, kind))
        self._note(self._key(packages, build.owner), made)
        return made

    async def ensure(self, digest: str) -> bool:
        """Have this package set here, from the blob store if need be; False where that hasn't got it. Raises
        OSError."""
        if not _DIGEST.fullmatch(digest):
            return False
        if self._is_here(digest):
            return True
        async with self._turns.take(digest, bounded=False):
            if self._is_here(digest):
                return True
            try:
                await self._in_scratch(lambda scratch: self._unpacked(digest, scratch))
            except (FileNotFoundError, archives.Damaged):
                return False
        return True

    async def _in_scratch[T](self, job: Callable[[Path], Awaitable[T]]) -> T:
        """What `job` does with a directory that is made and removed for it."""
        scratch = self._making / secrets.token_hex(8)
        self._at_work += 1
        try:
            return await job(scratch)
        finally:
            self._at_work -= 1
            # Who waits for the packages needn't wait for this.
            _go_on(asyncio.to_thread(trees.remove, scratch), self._clearing)

    def sweep(self, keep: set[str], older_than: float) -> int:
        gone = 0
        for digest in self.digests() - keep:
            directory = self.package_sets / digest
            if directory.stat().st_mtime < older_than:
                self._drop(directory)
                gone += 1
        for note in self._asked.iterdir():
            with suppress(OSError, ValueError, KeyError):
                if json.loads(note.read_text())["environment"] not in self.digests():
                    note.unlink()
        if not self._at_work and size_of(self._cache) > self._most_bytes:
            trees.remove(self._cache)
            self._open_cache()
        return gone

    def _open_cache(self) -> None:
        self._cache.mkdir(mode=0o700, exist_ok=True)
        self._processes.give(self._cache, self._processes.fetcher)

    def _key(self, packages: Packages, owner: str | None = None) -> str:
        text = json.dumps([_FORMAT, asdict(packages), self._runtimes, owner], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _note(self, key: str, made: PackageSet) -> None:
        temporary = self._asked / f"{key}.new"
        note = {"environment": made.digest, "stdout": made.stdout, "stderr": made.stderr}
        temporary.write_text(json.dumps(note))
        temporary.rename(self._asked / key)

    async def _made(
        self, packages: Packages, scratch: Path, say: Say | None, build: Build | None = None, kind: str = ""
    ) -> PackageSet:
        """The package set, put into its place. Raises MustBuild where something must be built and there is no `build`.
        `kind` is what is known to need one."""
        home, site, npm = scratch / "home", scratch / "site", scratch / "npm"
        try:
            for directory in (scratch, home, site, npm, npm / "node_modules"):
                directory.mkdir(mode=0o700)
                self._processes.give(directory, self._processes.fetcher)
            work = self._processes.path("work", scratch)
            environment = tools.environment(home, f"{work}/home", self._variables)
            making = _Making(scratch, time.monotonic() + self._seconds, say, environment)
            if packages.pip and build is not None and kind == "pip":
                making.built_for = build.owner
                await building.build_python(
                    build, packages, site, self._python, await self._indexes(making), making.deadline, say
                )
            elif packages.pip:
                await self._fetch_wheels(packages, making)
            if packages.npm:
                await self._fetch_npm(packages, making, build)
            if packages.go:
                await self._fetch_modules(packages, making)
            # Nobody else gets in from here on: what is looked at stays as it is.
            if self._processes.fetcher is not None:
                os.chown(scratch, 0, 0)
            told = await asyncio.to_thread(self._looked_at, making, packages)
            await self._keep(told, scratch, making.deadline)
        except OSError as error:
            raise SetupFailed(f"The packages could not be kept: {error.strerror or error}.") from error
        said, complained = ("\n".join(lines)[-LAST_WORDS:] for lines in (making.stdout, making.stderr))
        return replace(told, stdout=said, stderr=complained)

    async def _fetch_wheels(self, packages: Packages, making: _Making) -> None:
        """Raises MustBuild."""
        scratch = making.scratch
        (scratch / "requirements.txt").write_text("".join(f"{line}\n" for line in packages.pip))
        work = self._processes.path("work", scratch)
        command = tools.pip_command(
            self._interpreter(scratch),
            f"{work}/site",
            f"{work}/requirements.txt",
            self._processes.path("cache", scratch) + "/uv",
            self._processes.path("uv", scratch),
        )
        await self._fetch("pip", command, making.environment, making)

    async def _indexes(self, making: _Making) -> list[str]:
        """The addresses of the indexes that uv would ask. Raises SetupFailed where they ask for credentials."""
        scratch = making.scratch
        (scratch / "nothing.txt").touch()
        work = self._processes.path("work", scratch)
        command = tools.indexes_command(
            self._interpreter(scratch), f"{work}/nothing.txt", self._processes.path("uv", scratch)
        )
        told = replace(making, say=None, stdout=[], stderr=[])
        await self._fetch("pip", command, making.environment, told)
        return tools.indexes("".join(told.stdout), scratch / "home/.netrc", making.environment)

    async def _fetch_npm(self, packages: Packages, making: _Making, build: Build | None) -> None:
        """Raises MustBuild where packages have install scripts and there is no `build`."""
        scratch = making.scratch
        npm = scratch / "npm"
        (npm / "package.json").write_text(tools.package_json(packages))
        self._processes.give(npm / "package.json", self._processes.fetcher)
        cache = self._processes.path("cache", scratch)
        command = tools.npm_command(self._processes.path("node", scratch), f"{cache}/npm")
        command += ["--prefix", f"{self._processes.path('work', scratch)}/npm"]
        await self._fetch("npm", command, tools.npm_environment(making.environment, cache), making)
        making.npm, scripts = tools.npm_lock(npm)
        if scripts and build is None:
            raise MustBuild("npm", f"npm's {', '.join(scripts)[:1000]} must run code to be installed.")
        if scripts and build is not None:
            making.built_for = build.owner
            making.stdout += await building.run_scripts(build, scripts, npm, making.deadline, making.say)

    async def _fetch_modules(self, packages: Packages, making: _Making) -> None:
        """Have Go's modules, and all that they need, in `scratch/go`."""
        if self._go is None:
            raise SetupFailed("go: Go is not installed on this server.")
        scratch = making.scratch
        project = scratch / "go"
        project.mkdir(mode=0o700)
        (project / "go.mod").write_text(tools.GO_MOD)
        telemetry = scratch / "home/.config/go/telemetry"
        telemetry.mkdir(parents=True)
        (telemetry / "mode").write_text("off")  # or else a process of it would outlive the command
        for directory in (project, scratch / "home/.config"):
            trees.own(directory, self._processes.fetcher)
        go, work = self._processes.path("go", scratch) + "/bin/go", self._processes.path("work", scratch) + "/go"
        for command in tools.go_commands(go, work, packages):
            await self._fetch("go", command, tools.go_environment(making.environment, work), making)

    async def _fetch(self, tool: str, command: list[str], environment: Mapping[str, str], making: _Making) -> None:
        """Run a tool on the host, in its turn. Raises MustBuild, SetupFailed."""
        names = ["cache", {"pip": "uv", "npm": "node", "go": "go"}[tool], *(["python"] if self._prefix else [])]
        space = Space(making.scratch, self._cache, self._most_bytes)
        begun = time.monotonic()
        try:
            async with self._slots:
                making.deadline += time.monotonic() - begun
                ran = await self._processes.run(
                    command, environment, scratch=making.scratch, uid=self._processes.fetcher,
                    deadline=making.deadline, space=space, names=names, say=making.say,
                )  # fmt: skip
        except SetupFailed as problem:
            raise SetupFailed(f"{tool}: {problem}", "\n".join(making.stdout), "\n".join(making.stderr)) from None
        if ran.code != 0:
            if tool == "pip" and tools.lacks_wheels(ran):
                raise MustBuild(tool, tools.problem(tool, ran), ran.stdout, ran.stderr)
            raise SetupFailed(tools.problem(tool, ran), ran.stdout, ran.stderr)
        # What uv says of a success is of interest only while it lasts.
        for kept, more in ((making.stdout, ran.stdout), (making.stderr, "" if tool == "pip" else ran.stderr)):
            if more:
                kept.append(more)

    def _interpreter(self, scratch: Path) -> str:
        """The interpreter of sandboxes, where a tool sees it."""
        if self._prefix is None or self._processes.fetcher is None:
            return self._python
        return f"{self._processes.path('python', scratch)}/{Path(self._python).relative_to(self._prefix)}"

    def _looked_at(self, making: _Making, packages: Packages) -> PackageSet:
        """Put what was installed into its final shape below `scratch/made`, and pack that; what it is."""
        scratch, stdout = making.scratch, making.stdout
        made, site = scratch / "made", scratch / "made/python" / _SITE
        site.parent.mkdir(parents=True)
        (scratch / "site").rename(site)
        (scratch / "npm/node_modules").rename(made / "node_modules")
        if packages.go:
            (scratch / "go").rename(made / "go")
        for name in sorted(os.listdir(site)):
            if _AT_START.fullmatch(name) or name == ".lock":
                _drop(site / name)
                if name != ".lock":
                    stdout.append(f"Left out, since Python would act upon it at every start: {name}")
        programs = site / "bin"
        if programs.is_dir() and not programs.is_symlink():
            programs.rename(made / "python/bin")
        is_built = making.built_for is not None
        trees.check(made, most_files=self._most_files, most_bytes=self._most_bytes, separate=is_built)
        self._own(made)
        kinds = (("python", packages.pip), ("node", packages.npm), ("go", packages.go))
        lock: JsonObject = {
            "format": _FORMAT,
            "runtimes": {kind: self._runtimes[kind] for kind, asked in kinds if asked},
            "pip": _pip_lock(site),
            "npm": making.npm,
            "go": tools.go_modules(made / "go"),
            "built_for": making.built_for,
        }
        (made / archives.LOCK).write_text(json.dumps(lock, sort_keys=True))
        digest = archives.pack(made, scratch / "archive")
        return PackageSet(digest, lock["pip"], lock["npm"], go=lock["go"])

    def _unpack(self, digest: str, scratch: Path) -> None:
        scratch.mkdir(mode=0o700)
        fd = self._blobs.open_blob(digest)
        try:
            archives.unpack(fd, digest, scratch / "made")
        finally:
            os.close(fd)

    async def _unpacked(self, digest: str, scratch: Path) -> None:
        """Make the package set from its archive. Raises Damaged, OSError."""
        await asyncio.to_thread(self._unpack, digest, scratch)
        await self._finish(digest, scratch, time.monotonic() + self._seconds)

    async def _keep(self, told: PackageSet, scratch: Path, deadline: float) -> None:
        """Put its archive into the blob store, and the package set into its place. Raises OSError, also where the blob
        store can't be reached; then nothing of it is there."""
        if self._is_here(told.digest):  # so its archive is kept, too
            os.utime(self.package_sets / told.digest)
            return

        def put() -> None:
            with self._blobs.batch() as batch:
                batch.put_spooled(os.fspath(scratch / "archive"), told.digest)

        await asyncio.to_thread(put)
        await self._finish(told.digest, scratch, deadline)

    async def _finish(self, digest: str, scratch: Path, deadline: float) -> None:
        """Put what is in `scratch/made` into its place, compiled before or afterwards."""
        size = size_of(scratch / "made/python" / _SITE)
        if size > _MANY_BYTES:
            await self._compile(scratch, min(deadline, time.monotonic() + _COMPILE_SECONDS))
        elif size:
            (scratch / "made" / _UNCOMPILED).touch()
        await asyncio.to_thread(self._publish, scratch, digest)
        if 0 < size <= _MANY_BYTES:
            _go_on(self._compile_afterwards(digest), self._compiling)

    async def _compile_afterwards(self, digest: str) -> None:
        place = self.package_sets / digest

        async def compiled(scratch: Path) -> None:
            scratch.mkdir(mode=0o700)
            await asyncio.to_thread(shutil.copytree, place / "python", scratch / "made/python", symlinks=True)
            await self._compile(scratch, time.monotonic() + _COMPILE_SECONDS)
            await asyncio.to_thread(self._add_bytecode, scratch / "made", place)

        with suppress(OSError, SetupFailed):  # runs are slower then, and no worse
            await self._in_scratch(compiled)

    def _add_bytecode(self, made: Path, place: Path) -> None:
        self._own(made)
        sync_file_system(made)
        for where, directories, _ in os.walk(made):
            if "__pycache__" in directories:
                directories.remove("__pycache__")
                with suppress(OSError):  # its package has brought some of its own
                    os.rename(f"{where}/__pycache__", place / os.path.relpath(where, made) / "__pycache__")
        (place / _UNCOMPILED).unlink()
        sync_file_system(place)

    async def _compile(self, scratch: Path, deadline: float) -> None:
        """Have Python's bytecode beside its sources, so that no run must make it. That a file can't be compiled is
        its package's affair."""
        uid, bare = self._processes.compiler, scratch / "compiled"
        bare.mkdir()
        (scratch / "made/python").rename(bare / "python")
        await asyncio.to_thread(trees.own, bare, uid)
        work = self._processes.path("work", bare)
        command = [self._interpreter(scratch), "-I", "-S", "-m", "compileall", "-q"]
        command += ["-j", "0" if size_of(bare) > _MANY_BYTES else "1"]
        command += ["-s", f"{work}/python"]  # or else it would tell where on this machine that was
        command += ["--invalidation-mode", "unchecked-hash", f"{work}/python/{_SITE}"]
        space = Space(bare, bare, self._most_bytes)
        with suppress(SetupFailed):
            await self._processes.run(
                command, {"PATH": "/usr/bin:/bin"}, scratch=bare, uid=uid, deadline=deadline, space=space,
                names=["python"] if self._prefix else [],
            )  # fmt: skip
        if uid is not None:
            os.chown(bare, 0, 0)
        bare.chmod(0o700)
        await asyncio.to_thread(trees.check, bare, most_files=2 * self._most_files, most_bytes=4 * self._most_bytes)
        (bare / "python").rename(scratch / "made/python")

    def _publish(self, scratch: Path, digest: str) -> None:
        made, place = scratch / "made", self.package_sets / digest
        self._own(made)
        sync_file_system(made)
        try:
            made.rename(place)
        except OSError:
            if self._is_here(digest):  # somebody else was faster
                os.utime(place)
            else:
                self._drop(place)
                made.rename(place)
        sync_file_system(self.package_sets)

    def _is_here(self, digest: str) -> bool:
        return (self.package_sets / digest / archives.LOCK).exists()

    def _drop(self, directory: Path) -> None:
        """Remove a package set: at once, and then slowly."""
        doomed = self._making / f"gone-{secrets.token_hex(8)}"
        directory.rename(doomed)
        trees.remove(doomed)

    def _own(self, made: Path) -> None:
        trees.own(made, None if self._processes.fetcher is None else 0)


def _go_on(work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
    """Do it in a task of its own, which is in `tasks` until it has ended."""
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


def _drop(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        trees.remove(path)
    else:
        path.unlink()


def _pip_lock(site: Path) -> list[JsonObject]:
    """Name and version of every installed distribution."""
    found = []
    for directory in sorted(site.glob("*.dist-info")):
        fields: dict[str, str] = {}
        with suppress(OSError), (directory / "METADATA").open(errors="replace") as file:
            for _ in range(100):
                line = file.readline(2000).rstrip()
                if not line:
                    break
                name, _, value = line.partition(": ")
                fields.setdefault(name.lower(), value)
        name, _, version = directory.name.removesuffix(".dist-info").rpartition("-")
        found.append({"name": fields.get("name", name)[:200], "version": fields.get("version", version)[:200]})
    return found
