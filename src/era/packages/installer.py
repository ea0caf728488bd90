"""Environments: installed packages, made once and shared read-only by every session that asks for the same.

Theory of operation
===================

*Where.* `environments/DIGEST/` has `python/` (a user's base directory, as Python's site module knows it),
`node_modules/`, for Go `go/` (a cache of modules, and the go.mod and go.sum that name them), and `lock.json`. The
digest is that of all the content, so equal packages are there once, and a directory of that name is complete and never
changes. `environments/asked/` tells for a list of requirements which environment it came to; that is what makes the
same setup quick, and lets it work without any network.

*Making.* Tools write into a scratch directory, as users of no other right (processes.py). uv takes wheels only, npm
runs no scripts and `go get` builds nothing, so all of them only unpack. Once they have ended the scratch directory is
taken from them, looked at (trees.py), given a digest, compiled by a user who has nothing else, synced, and renamed to
its place. What a crash leaves is a scratch directory, and those are removed at the start.

*No code at start.* Python runs lines of `.pth` files in a site directory, and modules named sitecustomize and
usercustomize, before any program. They are left out: what is installed runs when it is imported.

*Going.* An environment that no session names is removed after a while. Being found for a setup counts as new, so one
isn't removed between the moment it was found and the one when a row names it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import secrets
import sys
import sysconfig
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from era.core.durable import sync_file_system
from era.core.models import JsonObject
from era.core.progress import Say
from era.core.requirements import Packages
from era.core.setups import Environment, SetupFailed
from era.core.turns import Turns
from era.packages import tools, trees
from era.packages.processes import Processes, Space, size_of, too_large

_DIGEST = re.compile("[0-9a-f]{64}")
_AT_START = re.compile(r".*\.pth|(usercustomize|sitecustomize)(\..*)?")
"""Names in a site directory that Python acts upon by itself."""

_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
_SITE = f"lib/python{_VERSION}/site-packages"
_COMPILE_SECONDS = 120.0
_MANY_BYTES = 16 << 20
"""With less to compile, starting a process for each processor takes longer than it saves."""

_LAST_WORDS = 4 << 10
_FORMAT = 1


class UvAndNpm:
    """An Installer in `directory`, which is the service's data directory. `open` before anything."""

    def __init__(
        self,
        directory: Path,
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
        self.environments = directory / "environments"
        self._asked = self.environments / "asked"
        self._making = self.environments / "making"
        self._cache = directory / "cache"
        self._seconds = seconds
        self._most_bytes = most_bytes
        self._most_files = most_files
        self._variables = variables
        self._turns = Turns()
        self._at_work = 0
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
        for directory, mode in ((self.environments, 0o711), (self._making, 0o700), (self._asked, 0o700)):
            directory.mkdir(mode=mode, parents=True, exist_ok=True)
            directory.chmod(mode)
        self._open_cache()

    def known(self, packages: Packages) -> Environment | None:
        try:
            digest = json.loads((self._asked / self._key(packages)).read_text())["environment"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        found = self.get(digest)
        if found is not None:
            with suppress(OSError):
                os.utime(self.environments / digest)
        return found

    def get(self, digest: str) -> Environment | None:
        try:
            return Environment(**json.loads((self.environments / digest / "lock.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def digests(self) -> set[str]:
        return {name for name in os.listdir(self.environments) if _DIGEST.fullmatch(name)}

    async def make(self, packages: Packages, *, anew: bool, say: Say | None = None) -> Environment:
        key = self._key(packages)
        async with self._turns.take(key, bounded=False):
            if not anew and (found := self.known(packages)) is not None:
                return found
            scratch = self._making / secrets.token_hex(8)
            self._at_work += 1
            try:
                made = await self._made(packages, scratch, say)
            except OSError as error:
                raise SetupFailed(f"The packages could not be kept: {error.strerror or error}.") from error
            finally:
                self._at_work -= 1
                await asyncio.shield(asyncio.to_thread(trees.remove, scratch))
            self._note(key, made.digest)
            return made

    def sweep(self, keep: set[str], older_than: float) -> int:
        gone = 0
        for digest in self.digests() - keep:
            directory = self.environments / digest
            if directory.stat().st_mtime < older_than:
                doomed = self._making / f"gone-{secrets.token_hex(8)}"
                directory.rename(doomed)  # at once, and then slowly
                trees.remove(doomed)
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

    def _key(self, packages: Packages) -> str:
        text = json.dumps([_FORMAT, asdict(packages), self._runtimes], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _note(self, key: str, digest: str) -> None:
        temporary = self._asked / f"{key}.new"
        temporary.write_text(json.dumps({"environment": digest}))
        temporary.rename(self._asked / key)

    async def _made(self, packages: Packages, scratch: Path, say: Say | None) -> Environment:
        deadline = time.monotonic() + self._seconds
        home, site, npm = scratch / "home", scratch / "site", scratch / "npm"
        for directory in (scratch, home, site, npm):
            directory.mkdir(mode=0o700)
            self._processes.give(directory, self._processes.fetcher)
        (npm / "node_modules").mkdir()
        self._processes.give(npm / "node_modules", self._processes.fetcher)
        work = self._processes.path("work", scratch)
        environment = tools.environment(home, f"{work}/home", self._variables)
        stdout: list[str] = []
        stderr: list[str] = []
        if packages.pip:
            (scratch / "requirements.txt").write_text("".join(f"{line}\n" for line in packages.pip))
            command = tools.pip_command(
                self._interpreter(scratch),
                f"{work}/site",
                f"{work}/requirements.txt",
                self._processes.path("cache", scratch) + "/uv",
                self._processes.path("uv", scratch),
            )
            await self._fetch("pip", command, environment, scratch, deadline, (stdout, stderr), say)
        if packages.npm:
            (npm / "package.json").write_text(tools.package_json(packages))
            self._processes.give(npm / "package.json", self._processes.fetcher)
            command = tools.npm_command(
                self._processes.path("node", scratch), self._processes.path("cache", scratch) + "/npm"
            )
            command += ["--prefix", f"{work}/npm"]
            await self._fetch("npm", command, environment, scratch, deadline, (stdout, stderr), say)
        if packages.go:
            await self._fetch_modules(packages, environment, scratch, deadline, (stdout, stderr), say)
        # Nobody else gets in from here on: what is looked at stays as it is.
        if self._processes.fetcher is not None:
            os.chown(scratch, 0, 0)
        digest, pip, npm_lock, modules = await asyncio.to_thread(self._looked_at, scratch, packages, stdout)
        said, complained = ("\n".join(lines)[-_LAST_WORDS:] for lines in (stdout, stderr))
        told = Environment(digest, pip, npm_lock, said, complained, modules)
        if packages.pip and not (self.environments / digest).exists():
            await self._compile(scratch, min(deadline, time.monotonic() + _COMPILE_SECONDS))
        await asyncio.to_thread(self._publish, scratch, told)
        return told

    async def _fetch_modules(
        self,
        packages: Packages,
        environment: Mapping[str, str],
        scratch: Path,
        deadline: float,
        said: tuple[list[str], list[str]],
        say: Say | None,
    ) -> None:
        """Have Go's modules, and all that they need, in `scratch/go`."""
        if self._go is None:
            raise SetupFailed("go: Go is not installed on this server.")
        project = scratch / "go"
        project.mkdir(mode=0o700)
        (project / "go.mod").write_text(tools.GO_MOD)
        trees.own(project, self._processes.fetcher)
        go, work = self._processes.path("go", scratch) + "/bin/go", self._processes.path("work", scratch) + "/go"
        for command in tools.go_commands(go, work, packages):
            await self._fetch("go", command, tools.go_environment(environment, work), scratch, deadline, said, say)

    async def _fetch(
        self,
        tool: str,
        command: list[str],
        environment: Mapping[str, str],
        scratch: Path,
        deadline: float,
        said: tuple[list[str], list[str]],
        say: Say | None,
    ) -> None:
        names = ["cache", {"pip": "uv", "npm": "node", "go": "go"}[tool], *(["python"] if self._prefix else [])]
        space = Space(scratch, self._cache, self._most_bytes)
        try:
            ran = await self._processes.run(
                command, environment, scratch=scratch, uid=self._processes.fetcher, deadline=deadline, space=space,
                names=names, say=say,
            )  # fmt: skip
        except SetupFailed as problem:
            raise SetupFailed(f"{tool}: {problem}", "\n".join(said[0]), "\n".join(said[1])) from None
        if ran.code != 0:
            raise SetupFailed(tools.problem(tool, ran), ran.stdout, ran.stderr)
        # What uv says of a success is of interest only while it lasts.
        for kept, more in zip(said, (ran.stdout, "" if tool == "pip" else ran.stderr), strict=True):
            if more:
                kept.append(more)

    def _interpreter(self, scratch: Path) -> str:
        """The interpreter of sandboxes, where a tool sees it."""
        if self._prefix is None or self._processes.fetcher is None:
            return self._python
        return f"{self._processes.path('python', scratch)}/{Path(self._python).relative_to(self._prefix)}"

    def _looked_at(
        self, scratch: Path, packages: Packages, stdout: list[str]
    ) -> tuple[str, list[JsonObject], list[JsonObject], list[JsonObject]]:
        """Put what was installed into its final shape below `scratch/made`; its digest and what it is."""
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
        npm = _npm_lock(scratch / "npm", made / "node_modules", stdout) if packages.npm else []
        content = trees.digest_of(made, most_files=self._most_files)
        if size_of(made) > self._most_bytes:
            raise too_large(self._most_bytes)
        kinds = [
            kind for kind, wanted in (("python", packages.pip), ("node", packages.npm), ("go", packages.go)) if wanted
        ]
        told = json.dumps([_FORMAT, content, {kind: self._runtimes[kind] for kind in kinds}], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest(), _pip_lock(site), npm, tools.go_modules(made / "go")

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
        await asyncio.to_thread(trees.digest_of, bare, most_files=2 * self._most_files, contents=False)
        (bare / "python").rename(scratch / "made/python")

    def _publish(self, scratch: Path, told: Environment) -> None:
        made, place = scratch / "made", self.environments / told.digest
        (made / "lock.json").write_text(json.dumps(asdict(told)))
        trees.own(made, None if self._processes.fetcher is None else 0)
        sync_file_system(made)
        try:
            made.rename(place)
        except OSError:
            if not place.exists():  # somebody else was not faster either
                raise
            os.utime(place)
        sync_file_system(self.environments)


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
            while (line := file.readline(2000).rstrip()) and len(fields) < 100:
                name, _, value = line.partition(": ")
                fields.setdefault(name.lower(), value)
        name, _, version = directory.name.removesuffix(".dist-info").rpartition("-")
        found.append({"name": fields.get("name", name)[:200], "version": fields.get("version", version)[:200]})
    return found


def _npm_lock(project: Path, modules: Path, stdout: list[str]) -> list[JsonObject]:
    """What is in a node_modules directory, by npm's own lock. Raises SetupFailed where a package would have to be
    built."""
    locked = json.loads((project / "package-lock.json").read_text())["packages"]
    found, silent = [], []
    for path, package in sorted(locked.items()):
        where = modules / path.removeprefix("node_modules/")
        if not path or not where.is_dir():
            continue  # the project itself, or an optional package for other machines
        name = path.rpartition("node_modules/")[2]
        if package.get("hasInstallScript"):
            if (where / "binding.gyp").exists() and not (where / "prebuilds").exists():
                raise SetupFailed(
                    f"npm's {name} {package.get('version')} must be built, which would run its code here. Ask for "
                    "another version or package."
                )
            silent.append(name)
        item = {"name": name, "version": package.get("version", ""), "integrity": package.get("integrity")}
        found.append(item if path == f"node_modules/{name}" else {**item, "path": path})
    if silent:
        stdout.append(f"Install scripts that were not run: {', '.join(silent)}")
    return found
