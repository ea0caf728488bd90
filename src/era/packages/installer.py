"""The installer of package sets: installed packages, made once and shared read-only by all sessions that ask for them.

Theory of operation
===================

*Layout.* `environments/DIGEST/` has `python/` (a user's base directory, as Python's site module defines it),
`node_modules/`, for Go `go/` (a cache of modules, with the go.mod and go.sum that name them), and `lock.json`. The
digest is that of an archive of all this (trees.pack), so equal packages are stored once, and a directory of that name
is complete and never changes. The archive is in the blob store; a directory that is missing here is unpacked from it.
`environments/asked/` has a note for each list of requirements, which names the package set that it came to. Notes make
a repeated setup fast, and possible without any network. Hosts of a cluster have them in the directory that they share:
so a setup that was done at one host comes to the same versions at every other, which unpacks the archive.

*Making.* Tools write into a scratch directory, as unprivileged users (processes.py). uv takes wheels only, npm runs no
scripts and `go get` builds nothing, so all of them only unpack. If that isn't enough, what must run code runs in a
sandbox of the session that asked (building.py), and the result is moved here. Then the scratch directory is checked
(trees.py), packed, compiled by a user who owns nothing else, flushed, and renamed to its place. The archive is durable
before that, and both are before a note or a row names them. A crash leaves a scratch directory, which the next start
removes, or a blob that nothing names.

*Bytecode.* Compiling a few packages takes longer than fetching them, and without bytecode a program compiles for itself
what it imports. So where there is little to compile, that is done on a copy once the package set is in its place, and
added to it. Until then the set has a mark; should the service end, a set with a mark is unpacked from its archive
again. Where there is much to compile, no run should have to do it: that is done before. Bytecode may be missing:
bytecode.py has the bounds.

*Ownership.* A package set that was only unpacked is shared by all. What was built was made by code of strangers, who
could make it anything: it is used by the session that built it only. So that session is part of the note's name, and,
through the lock, of the digest.

*No code at start.* Python executes lines of `.pth` files in a site directory, and modules named sitecustomize and
usercustomize, before any program. They are left out: what is installed runs when it is imported.

*Removal.* A package set that no session names is removed after a while. That time begins anew when a setup finds it, so
it isn't removed between that moment and the one when a row names it: a sweep takes seconds, so before it removes a set
it looks once more, under a lock that finders take. Its blob is kept as long as the directory is here or a row names it.
In a cluster the host that collects garbage knows its own directories only: so what a setup finds counts only where its
blob is there, too, whose time begins anew as well.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import sys
import sysconfig
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path

from era.core.concurrency.fair_limiter import FairLimiter
from era.core.concurrency.outages import note_outage
from era.core.concurrency.turns import Turns
from era.core.models import JsonObject
from era.core.setup.commands import Build
from era.core.setup.package_sets import PackageSet, SetupFailed
from era.core.setup.progress import LAST_WORDS, Say
from era.core.setup.requirements import Packages
from era.core.trees.blob_store import BlobStore
from era.core.trees.durable import sync_file_system
from era.packages import building, tools, trees
from era.packages.building import Making, MustBuild
from era.packages.bytecode import Compiler
from era.packages.notes import Notes
from era.packages.processes import Processes, Space, in_background, in_thread, size_of

_DIGEST = re.compile("[0-9a-f]{64}")
_RUN_AT_START = re.compile(r".*\.pth|(usercustomize|sitecustomize)(\..*)?")
"""Names in a site directory that Python runs or loads at every start."""

_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
_SITE = f"lib/python{_VERSION}/site-packages"
_MANY_BYTES = 16 << 20
"""With less to compile, nobody waits for it, and a second process would cost more than it saves."""

_PATIENCE_SECONDS = 10.0
"""How long an installation waits for the compiler."""

_UNCOMPILED = "uncompiled"
"""A file beside the lock: the mark of a set whose bytecode is still missing."""

_AT_A_TIME, _OF_OWNER = 3, 2
"""How many sets are made at the same time, and how many of one owner: a place is left to others, however much he wants
and however long that takes. Builds in sandboxes don't count."""

_FORMAT = 2


class PackageInstaller:
    """The implementation of package_sets.Installer. `open` it first, `stop` it last."""

    def __init__(
        self,
        directory: Path,
        blobs: BlobStore,
        *,
        shared: Path,
        python: str,
        python_prefix: Path | None,
        runtimes: Mapping[str, Path],
        seconds: float,
        most_bytes: int,
        most_files: int,
        variables: Mapping[str, str],
    ) -> None:
        """`directory` is the service's data directory, `shared` that which hosts of a cluster share, or the same.
        `python` is the interpreter of sandboxes, and `python_prefix` its installation if that isn't in /usr. `runtimes`
        are the directories of `node` and, if there is one, of `go`. `seconds`, `most_bytes` and `most_files` bound one
        installation. `variables` are the service's own environment variables."""
        self.package_sets = directory / "environments"
        self._notes = Notes(shared / "environments" / "asked")
        self._making = self.package_sets / "making"
        self._cache = directory / "cache"
        self._seconds = seconds
        self._most_bytes = most_bytes
        self._most_files = most_files
        self._variables = variables
        self._blobs = blobs
        self._turns = Turns()
        self._slots = FairLimiter(_AT_A_TIME, of_owner=_OF_OWNER)
        self._scratch_directories = 0
        self._lock = threading.Lock()
        """Held while a set's time is looked at and the set renamed, or begins anew; and while what the cache has is
        renamed, or an installation begins. The event loop takes it, too."""

        self._compiling: set[asyncio.Task[None]] = set()
        self._clearing: set[asyncio.Task[None]] = set()
        shown = {"cache": self._cache, "uv": tools.uv_binary(), **runtimes}
        self._python, self._prefix = python, python_prefix
        self._has_go = "go" in runtimes
        if python_prefix is not None:
            shown["python"] = python_prefix
        self._processes = Processes(directory, shown)
        self._python_names = ["python"] if python_prefix else []
        """What a tool needs to see of the interpreter of sandboxes."""

        self._compiler = Compiler(
            self._processes, self._python_names, most_bytes=self._most_bytes, most_files=self._most_files
        )
        self._runtimes = {
            "python": f"{sys.implementation.name} {_VERSION} {sysconfig.get_platform()}",
            "node": (runtimes["node"] / "include/node/node_version.h").read_text()[:2000],
            "go": (runtimes["go"] / "VERSION").read_text()[:2000] if self._has_go else "",
        }

    def open(self) -> None:
        """Make the directories, and remove what a killed process left unfinished. Raises OSError."""
        trees.remove(self._making)
        for directory, mode in ((self.package_sets, 0o711), (self._making, 0o700)):
            directory.mkdir(mode=mode, parents=True, exist_ok=True)
            directory.chmod(mode)
        self._notes.open()
        for digest in self.digests():
            if (self.package_sets / digest / _UNCOMPILED).exists():
                trees.remove(self.package_sets / digest)
        self._open_cache()

    async def stop(self) -> None:
        """Cancel what still compiles: the next start makes these package sets again."""
        for task in self._compiling:
            task.cancel()
        await asyncio.gather(*self._compiling, return_exceptions=True)
        await self.finish_background()

    async def finish_background(self) -> None:
        """Wait for the compiling and clearing away that goes on after package sets were made, however it ends."""
        while tasks := [*self._compiling, *self._clearing]:  # what ends may leave something to clear away
            await asyncio.wait(tasks)  # unlike gather, lets those that have just ended leave their sets

    async def find_installed(self, packages: Packages, owner: str) -> PackageSet | None:
        for key in (self.name(packages), self.name(packages, owner)):
            note = self._notes.find(key)
            package_set = None if note is None else self.get(note.digest)
            if note is None or package_set is None:
                continue
            with suppress(OSError):
                # In a cluster another host collects garbage, and doesn't know which sets are here.
                if await in_thread(self._blobs.renew, note.digest) and self._renew(note.digest):
                    self._notes.renew(key)
                    return replace(package_set, stdout=note.stdout, stderr=note.stderr)
        return None

    async def _find_anywhere(self, packages: Packages, owner: str) -> PackageSet | None:
        """`find_installed`, also where the set is in the blob store only: another host has made it, or nobody has used
        it here for long."""
        if (found := await self.find_installed(packages, owner)) is not None:
            return found
        for key in (self.name(packages), self.name(packages, owner)):
            if (note := self._notes.find(key)) is None:
                continue
            with suppress(OSError), self._blobs.naming():  # after an error it is installed
                if await in_thread(self._blobs.renew, note.digest) and await self.ensure(note.digest):
                    return await self.find_installed(packages, owner)
        return None

    def get(self, digest: str) -> PackageSet | None:
        try:
            lock = json.loads((self.package_sets / digest / trees.LOCK).read_text())
            return PackageSet(digest, lock["pip"], lock["npm"], go=lock["go"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def digests(self) -> set[str]:
        """The package sets on this machine."""
        return {name for name in os.listdir(self.package_sets) if _DIGEST.fullmatch(name)}

    def is_here(self, digest: str) -> bool:
        """Whether a package set is on this machine."""
        return (self.package_sets / digest / trees.LOCK).exists()

    def is_prepared(self, name: str) -> bool:
        """Whether the packages of this name are on this machine, as they were last installed for anybody."""
        note = self._notes.find(name) if _DIGEST.fullmatch(name) else None
        return note is not None and self.is_here(note.digest)

    async def make(self, packages: Packages, build: Build, *, anew: bool, say: Say | None = None) -> PackageSet:
        key = self.name(packages)
        try:
            # The slot first: who has the turn would keep others waiting for it while he waits for his owner's slots.
            async with self._slots.slot(build.session_owner), self._turns.take(key, bounded=False):
                if not anew and (package_set := await self._find_anywhere(packages, build.owner)) is not None:
                    return package_set
                made = await self._in_scratch(lambda scratch: self._install(packages, scratch, say))
                self._note(key, made)
                return made
        except MustBuild as must:
            if say is not None:
                say("stdout", b"Some of it has to run code to be installed. That is done in a sandbox.\n")
            kind = must.kind
        # Outside the turn: nobody else waits for this, however long it takes.
        made = await self._in_scratch(lambda scratch: self._install(packages, scratch, say, build, kind))
        self._note(self.name(packages, build.owner), made)
        return made

    async def ensure(self, digest: str) -> bool:
        if not _DIGEST.fullmatch(digest):
            return False
        if self.is_here(digest):
            return True
        async with self._turns.take(digest, bounded=False):
            if self.is_here(digest):
                return True
            try:
                await self._in_scratch(lambda scratch: self._restore(digest, scratch))
            except trees.Damaged:
                return False
        return True

    def _note(self, key: str, made: PackageSet) -> None:
        """Note what a request came to. Where that can't be, the next one like it is installed once more."""
        try:
            self._notes.write(key, made)
        except OSError as error:
            note_outage("package_set_not_noted", error)

    async def _in_scratch[T](self, job: Callable[[Path], Awaitable[T]]) -> T:
        """Run `job` with the path of a scratch directory, which it makes itself and which is removed afterwards."""
        scratch = self._making / secrets.token_hex(8)
        with self._lock:
            self._scratch_directories += 1
        try:
            return await job(scratch)
        finally:
            self._scratch_directories -= 1
            # In the background, since the caller waits for the packages.
            in_background(in_thread(trees.remove, scratch), self._clearing)

    def sweep(self, keep: set[str], older_than: float, free_before: float) -> int:
        removed = size = 0
        unneeded = [self.package_sets / digest for digest in self.digests() - keep]
        for used, directory in sorted(((each.stat().st_mtime, each) for each in unneeded), reverse=True):
            size += size_of(directory) if used < free_before else 0
            if (used < older_than or size > self._most_bytes) and self._drop(directory, used):
                removed += 1
        # What another host has isn't known, but a note that it uses isn't old.
        self._notes.sweep(self.digests(), older_than)
        if not self._scratch_directories and size_of(self._cache) > self._most_bytes:
            with self._lock:  # in place: a full disk has no room for another directory, and this one may be a mount
                doomed = [] if self._scratch_directories else trees.set_aside(self._cache)
            for path in doomed:
                trees.drop(path, is_ours=self._processes.fetcher is None)
        return removed

    def _open_cache(self) -> None:
        """Make the directory of the tools' caches."""
        self._cache.mkdir(mode=0o700, exist_ok=True)
        self._processes.change_owner(self._cache, self._processes.fetcher)

    def name(self, packages: Packages, owner: str | None = None) -> str:
        """The name of the note for these packages: of all sessions, or of the one that had them built (`owner`). It is
        the same at hosts with the same runtimes."""
        text = json.dumps([_FORMAT, asdict(packages), self._runtimes, owner], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    async def _install(
        self, packages: Packages, scratch: Path, say: Say | None, build: Build | None = None, kind: str = ""
    ) -> PackageSet:
        """Install packages and put the set into its place. `kind` is the kind of packages that is known to need
        building. Raises MustBuild where something has to be built and there is no `build`, SetupFailed."""
        home, site, npm = scratch / "home", scratch / "site", scratch / "npm"
        try:
            for directory in (scratch, home, site, npm, npm / "node_modules"):
                directory.mkdir(mode=0o700)
                self._processes.change_owner(directory, self._processes.fetcher)
            work = self._processes.path("work", scratch)
            variables = tools.environment(home, f"{work}/home", self._variables)
            waits_as = None if build is None else build.session_owner
            making = Making(scratch, time.monotonic() + self._seconds, say, variables, waits_as)
            if packages.pip and build is not None and kind == "pip":
                making.built_for = build.owner
                await building.build_python(build, packages, self._python, await self._indexes(making), making)
            elif packages.pip:
                await self._fetch_wheels(packages, making)
            if packages.npm:
                await self._fetch_npm(packages, making, build)
            if packages.go:
                await self._fetch_modules(packages, making)
            # From here on tools' users can't get in: what is checked stays as it is.
            if self._processes.fetcher is not None:
                os.chown(scratch, 0, 0)
            installed = await in_thread(self._pack, making, packages)
            await self._keep(installed, scratch, making.deadline)
        except OSError as error:
            raise SetupFailed(f"The packages could not be kept: {error.strerror or error}.") from error
        stdout, stderr = ("\n".join(lines)[-LAST_WORDS:] for lines in (making.stdout, making.stderr))
        return replace(installed, stdout=stdout, stderr=stderr)

    async def _fetch_wheels(self, packages: Packages, making: Making) -> None:
        """Have uv install wheels into `scratch/site`. Raises MustBuild where a package has none, SetupFailed."""
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
        await self._fetch("pip", command, making.variables, making)

    async def _indexes(self, making: Making) -> list[str]:
        """The addresses of the indexes that uv would ask. Raises SetupFailed where it has credentials for one."""
        scratch = making.scratch
        (scratch / "nothing.txt").touch()
        work = self._processes.path("work", scratch)
        command = tools.indexes_command(
            self._interpreter(scratch), f"{work}/nothing.txt", self._processes.path("uv", scratch)
        )
        quiet = replace(making, say=None, stdout=[], stderr=[])
        await self._fetch("pip", command, making.variables, quiet)
        return tools.indexes("".join(quiet.stdout), scratch / "home/.netrc", making.variables)

    async def _fetch_npm(self, packages: Packages, making: Making, build: Build | None) -> None:
        """Have npm install packages into `scratch/npm`. Raises MustBuild where some have install scripts and there is
        no `build`, SetupFailed."""
        scratch = making.scratch
        npm = scratch / "npm"
        (npm / "package.json").write_text(tools.package_json(packages))
        self._processes.change_owner(npm / "package.json", self._processes.fetcher)
        cache = self._processes.path("cache", scratch)
        command = tools.npm_command(self._processes.path("node", scratch), f"{cache}/npm")
        command += ["--prefix", f"{self._processes.path('work', scratch)}/npm"]
        await self._fetch("npm", command, tools.npm_environment(making.variables, cache), making)
        making.npm, scripts = tools.npm_lock(npm)
        if scripts and build is None:
            raise MustBuild("npm", f"npm's {', '.join(scripts)[:1000]} must run code to be installed.")
        if scripts and build is not None:
            making.built_for = build.owner
            await building.run_scripts(build, scripts, making)

    async def _fetch_modules(self, packages: Packages, making: Making) -> None:
        """Have go fetch modules, and all that they need, into `scratch/go`. Raises SetupFailed."""
        if not self._has_go:
            raise SetupFailed("go: Go is not installed on this server.")
        scratch = making.scratch
        project = scratch / "go"
        project.mkdir(mode=0o700)
        (project / "go.mod").write_text(tools.GO_MOD)
        telemetry = scratch / "home/.config/go/telemetry"
        telemetry.mkdir(parents=True)
        (telemetry / "mode").write_text("off")  # or a process for telemetry would outlive the command
        for directory in (project, scratch / "home/.config"):
            trees.own(directory, self._processes.fetcher)
        go, work = self._processes.path("go", scratch) + "/bin/go", self._processes.path("work", scratch) + "/go"
        for command in tools.go_commands(go, work, packages):
            await self._fetch("go", command, tools.go_environment(making.variables, work), making)

    async def _fetch(self, tool: str, command: list[str], variables: Mapping[str, str], making: Making) -> None:
        """Run a tool on the host, for a build once a slot is free; the wait for that doesn't count for the deadline.
        Raises MustBuild, SetupFailed."""
        names = ["cache", {"pip": "uv", "npm": "node", "go": "go"}[tool], *self._python_names]
        space = Space(making.scratch, self._cache, self._most_bytes)
        begun, waits_as = time.monotonic(), making.waits_as
        try:
            async with nullcontext() if waits_as is None else self._slots.slot(waits_as):
                making.deadline += time.monotonic() - begun
                ran = await self._processes.run(
                    command, variables, scratch=making.scratch, uid=self._processes.fetcher,
                    deadline=making.deadline, space=space, names=names, say=making.say,
                )  # fmt: skip
        except SetupFailed as problem:
            raise SetupFailed(f"{tool}: {problem}", "\n".join(making.stdout), "\n".join(making.stderr)) from None
        if ran.code != 0:
            if tool == "pip" and tools.lacks_wheels(ran):
                raise MustBuild(tool, tools.problem(tool, ran), ran.stdout, ran.stderr)
            raise SetupFailed(tools.problem(tool, ran), ran.stdout, ran.stderr, no_such=tools.no_such(ran))
        # uv's stderr is its progress, of no interest after a success.
        for kept, more in ((making.stdout, ran.stdout), (making.stderr, "" if tool == "pip" else ran.stderr)):
            if more:
                kept.append(more)

    def _interpreter(self, scratch: Path) -> str:
        """The path by which a tool sees the interpreter of sandboxes."""
        if self._prefix is None or self._processes.fetcher is None:
            return self._python
        return f"{self._processes.path('python', scratch)}/{Path(self._python).relative_to(self._prefix)}"

    def _pack(self, making: Making, packages: Packages) -> PackageSet:
        """Move what was installed to its final layout in `scratch/made`, check it, and make `scratch/archive` of it.
        Raises SetupFailed, OSError."""
        scratch, stdout = making.scratch, making.stdout
        made, site = scratch / "made", scratch / "made/python" / _SITE
        site.parent.mkdir(parents=True)
        (scratch / "site").rename(site)
        (scratch / "npm/node_modules").rename(made / "node_modules")
        if packages.go:
            (scratch / "go").rename(made / "go")
        for name in sorted(os.listdir(site)):
            if _RUN_AT_START.fullmatch(name) or name == ".lock":
                trees.drop(site / name)
                if name != ".lock":
                    stdout.append(f"Left out, since Python would act upon it at every start: {name}")
        programs = site / "bin"
        if programs.is_dir() and not programs.is_symlink():
            programs.rename(made / "python/bin")
        is_built = making.built_for is not None
        trees.check(made, most_files=self._most_files, most_bytes=self._most_bytes, separate=is_built)
        self._own(made)
        trees.drop_bytecode(site)  # it may have times in it, and equal packages are to have equal archives
        kinds = (("python", packages.pip), ("node", packages.npm), ("go", packages.go))
        lock: JsonObject = {
            "format": _FORMAT,
            "runtimes": {kind: self._runtimes[kind] for kind, requested in kinds if requested},
            "pip": tools.pip_lock(site),
            "npm": making.npm,
            "go": tools.go_modules(made / "go"),
            "built_for": making.built_for,
        }
        (made / trees.LOCK).write_text(json.dumps(lock, sort_keys=True))
        digest = trees.pack(made, scratch / "archive")
        return PackageSet(digest, lock["pip"], lock["npm"], go=lock["go"])

    def _unpack(self, digest: str, scratch: Path) -> None:
        """Unpack an archive into `scratch/made`. Raises Damaged, also where there is none; OSError."""
        scratch.mkdir(mode=0o700)
        try:
            fd = self._blobs.open_blob(digest)
        except FileNotFoundError as error:
            raise trees.Damaged(digest) from error
        try:
            trees.unpack(fd, digest, scratch / "made")
        finally:
            os.close(fd)

    async def _restore(self, digest: str, scratch: Path) -> None:
        """Make a package set from its archive. Raises Damaged, OSError."""
        await in_thread(self._unpack, digest, scratch)
        try:
            await self._finish(digest, scratch, time.monotonic() + self._seconds)
        except SetupFailed as problem:  # it exceeds bounds that were lowered since
            raise OSError(str(problem).rstrip(".")) from problem

    async def _keep(self, installed: PackageSet, scratch: Path, deadline: float) -> None:
        """Put the archive into the blob store, then the package set into its place. Raises OSError, also where the blob
        store can't be reached; nothing is kept then."""

        def put() -> None:
            with self._blobs.batch() as batch:
                batch.put_spooled(os.fspath(scratch / "archive"), installed.digest)

        with self._blobs.naming():  # from here on, package sets that are here keep their archives
            await in_thread(put)
            if not self._renew(installed.digest):
                await self._finish(installed.digest, scratch, deadline)

    async def _finish(self, digest: str, scratch: Path, deadline: float) -> None:
        """Publish `scratch/made`, compiled before if it is large and the compiler is free soon, else afterwards."""
        size = size_of(scratch / "made/python" / _SITE)
        is_compiled = not size
        if size > _MANY_BYTES:
            async with self._compiler.turn(min(deadline - time.monotonic(), _PATIENCE_SECONDS)) as is_compiled:
                if is_compiled:
                    await self._compile(scratch, deadline, is_large=True)
        if not is_compiled:
            (scratch / "made" / _UNCOMPILED).touch()
        await in_thread(self._publish, scratch, digest)
        if not is_compiled:
            in_background(self._compile_afterwards(digest), self._compiling)

    async def _compile_afterwards(self, digest: str) -> None:
        """Compile a copy of a published package set, and add the bytecode to it. Where that can't be, the mark is taken
        away, too, or each start would try again, and end as this has."""
        place = self.package_sets / digest

        async def compile_copy(scratch: Path) -> None:
            scratch.mkdir(mode=0o700)
            await in_thread(shutil.copytree, place / "python", scratch / "made/python", symlinks=True)
            await self._compile(scratch, math.inf, is_large=False)
            await in_thread(self._add_bytecode, scratch / "made", place)

        async with self._compiler.turn():  # before it is copied, or copies would be waiting
            try:
                await self._in_scratch(compile_copy)
            except SetupFailed:  # runs are slower then, and no worse
                with suppress(OSError):
                    (place / _UNCOMPILED).unlink()
            except OSError as error:  # it may pass, so the next start tries it again
                note_outage("packages_not_compiled", error)

    async def _compile(self, scratch: Path, deadline: float, *, is_large: bool) -> None:
        """See Compiler.compile."""
        await self._compiler.compile(scratch, self._interpreter(scratch), _SITE, deadline, is_large=is_large)

    def _add_bytecode(self, made: Path, place: Path) -> None:
        """Move the `__pycache__` directories of a compiled copy to the published set, and take its mark away."""
        self._own(made)
        sync_file_system(made)
        for where, directories, _ in os.walk(made):
            if "__pycache__" in directories:
                directories.remove("__pycache__")
                with suppress(OSError):  # the package has a __pycache__ of its own
                    os.rename(f"{where}/__pycache__", place / os.path.relpath(where, made) / "__pycache__")
        (place / _UNCOMPILED).unlink()
        sync_file_system(place)

    def _publish(self, scratch: Path, digest: str) -> None:
        """Flush `scratch/made` to disk and rename it to its place. Raises OSError."""
        made, place = scratch / "made", self.package_sets / digest
        self._own(made)
        sync_file_system(made)
        try:
            made.rename(place)
        except OSError:
            if not self._renew(digest):  # else another installation came to the same
                with suppress(FileNotFoundError):  # a sweep was faster
                    self._drop(place)
                made.rename(place)
        sync_file_system(self.package_sets)

    def _renew(self, digest: str) -> bool:
        """Have a package set's time begin anew, if it is on this machine; whether it is. Raises OSError."""
        with self._lock:
            if is_here := self.is_here(digest):
                os.utime(self.package_sets / digest)
        return is_here

    def _drop(self, directory: Path, used: float | None = None) -> bool:
        """Remove a package set, with `used` only if its time is still that; whether it was removed. It is renamed
        first, since removing takes long, so that nobody sees half of one. Raises OSError."""
        doomed = self._making / f"gone-{secrets.token_hex(8)}"
        with self._lock:
            if used not in (None, directory.stat().st_mtime):
                return False  # it was found meanwhile
            directory.rename(doomed)
        trees.remove(doomed)
        return True

    def _own(self, made: Path) -> None:
        """Make the service the owner of all files, readable for everybody."""
        trees.own(made, None if self._processes.fetcher is None else 0)
