"""Package sets: what setups have installed, shared read-only by every session that asks for the same packages.

A lock has the exact versions of a package set, so that the same packages can be installed again elsewhere. It is `{pip,
npm, go}`, each a list of `{name, version, …}` as in a package set. It is shown to clients and put into capsules. When a
session is imported, its lock turns the setup into one that asks for exactly those versions. A lock in a capsule comes
from a stranger: it may contain only what a setup could ask for, and nothing but its names and versions is used.

For Go, the versions of the requested modules settle those of all others. With npm, the same package may be installed in
several versions, below the packages that need it; npm's overrides express that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import structlog

from era.core.metadata import MetadataStore
from era.core.models import JsonObject, Session
from era.core.setup.commands import Build
from era.core.setup.progress import Say
from era.core.setup.requirements import GO_PATH, GO_VERSION, NPM_NAME, PIP_NAME, Packages
from era.errors import Unavailable

KINDS = ("pip", "npm", "go")
MAX_PACKAGES = 5_000
"""Of each kind."""

_MAX_DEPTH = 20
"""Of a package of npm below others."""

_SHOWN = 5
"""Differences that are listed; the others are counted."""

_PIP_NAME = re.compile(PIP_NAME)
_PIP_VERSION = re.compile(r"[A-Za-z0-9.+!_-]{1,200}")
_NPM_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,200}")
_INTEGRITY = re.compile(r"[A-Za-z0-9+/=: -]{1,1000}")


def can_be_lock(value: object) -> bool:
    """Whether a server could have written this value as a lock. For locks from outside."""
    if not isinstance(value, dict) or value.keys() != set(KINDS):
        return False
    return all(
        isinstance(items, list) and len(items) <= MAX_PACKAGES and all(_can_be_item(kind, item) for item in items)
        for kind, items in value.items()
    )


def pinned(packages: Packages, lock: Mapping[str, Any]) -> Packages:
    """A request for the same packages in the versions of a lock, with everything they need in its versions, too."""
    pip = {f"{item['name']}=={item['version']}" for item in lock["pip"]} if packages.pip else set()
    top = {item["name"]: item["version"] for item in lock["npm"] if "path" not in item}
    overrides = sorted(_overrides(lock)) if packages.npm else ()
    modules = {item["name"]: item["version"] for item in lock["go"]}
    return replace(
        packages,
        pip=tuple(sorted(pip)) or packages.pip,
        npm=tuple((name, top.get(name, version)) for name, version in packages.npm),
        go=tuple((path, modules.get(path, version)) for path, version in packages.go),
        overrides=tuple(overrides),
    )


def differences(lock: Mapping[str, Any], installed: Mapping[str, Any]) -> str:
    """The differences between the installed packages and a lock, in words; "" if there are none."""
    found = []
    for kind in KINDS:
        locked, present = ({_identity(item): item for item in source[kind]} for source in (lock, installed))
        for place in sorted(locked.keys() | present.keys()):
            before, now = locked.get(place), present.get(place)
            if before is None or now is None or before["version"] != now["version"]:
                found.append(f"{place} {_version(now)}, not {_version(before)}")
            elif before.get("integrity") and now.get("integrity") and before["integrity"] != now["integrity"]:
                found.append(f"{place} {_version(now)} with other content")
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def _overrides(lock: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """npm's overrides that pin every package of a lock: the names of the packages that lead to it, itself last, and its
    version. A package that is installed under an alias is left to npm."""
    for item in lock["npm"]:
        chain = tuple(part.strip("/") for part in item.get("path", item["name"]).split("node_modules/") if part)
        if chain[-1] == item["name"]:
            yield chain, item["version"]


def _can_be_item(kind: str, item: object) -> bool:
    """Whether this is an entry of a lock's list `kind`."""
    optional = {"pip": set[str](), "npm": {"integrity", "path"}, "go": {"integrity"}}[kind]
    if not isinstance(item, dict) or not {"name", "version"} <= item.keys() <= {"name", "version", *optional}:
        return False
    name, version = item["name"], item["version"]
    if not isinstance(name, str) or not isinstance(version, str) or len(name) > 300 or len(version) > 300:
        return False
    integrity = item.get("integrity")
    if integrity is not None and not (isinstance(integrity, str) and _INTEGRITY.fullmatch(integrity)):
        return False
    match kind:
        case "pip":
            return bool(_PIP_NAME.fullmatch(name) and _PIP_VERSION.fullmatch(version))
        case "npm":
            return _is_npm(name) and bool(_NPM_VERSION.fullmatch(version)) and _can_be_path(item.get("path", name))
    return ".." not in name and bool(GO_PATH.fullmatch(name) and GO_VERSION.fullmatch(version))


def _is_npm(name: str) -> bool:
    return len(name) <= 214 and name != "node_modules" and NPM_NAME.fullmatch(name) is not None


def _can_be_path(path: object) -> bool:
    """Whether npm could have installed a package at this path of a project."""
    if not isinstance(path, str) or len(path) > 4096:
        return False
    chain = path.removeprefix("node_modules/").split("/node_modules/")
    return len(chain) <= _MAX_DEPTH and all(map(_is_npm, chain))


def _identity(item: JsonObject) -> str:
    """What tells a package from others of its kind: npm's path, else the name."""
    return str(item.get("path", item["name"])).removeprefix("node_modules/")


def _version(item: JsonObject | None) -> str:
    return "(none)" if item is None else str(item["version"])


log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class PackageSet:
    """Installed packages. `pip`, `npm` and `go` are lists of `{name, version, …}`."""

    digest: str
    """SHA-256 of the archive of all its files, in hex: equal packages have the same."""

    pip: Sequence[JsonObject]
    npm: Sequence[JsonObject]
    stdout: str = ""
    stderr: str = ""
    """The end of what the tools wrote when it was installed."""

    go: Sequence[JsonObject] = ()


class SetupFailed(Exception):
    """The packages can't be installed: the message says why and what may help. `stdout` and `stderr` are the end of
    what the tools wrote. With `no_such` the registry has no such packages, or none that go together or fit this
    machine; without it, another try may succeed."""

    def __init__(self, message: str, stdout: str = "", stderr: str = "", *, no_such: bool = False) -> None:
        super().__init__(message)
        self.no_such = no_such
        self.stdout = stdout
        self.stderr = stderr


class Installer(Protocol):
    """Installs package sets and keeps them on this machine. Implemented by packages/."""

    async def find_installed(self, packages: Packages, owner: str) -> PackageSet | None:
        """The set that these packages came to when they were last installed, None if it isn't on this machine or not in
        the blob store any more. A set that had to be built is found only by the `owner` (Build.owner) for whom it was
        built."""
        ...

    async def make(self, packages: Packages, build: Build, *, anew: bool, say: Say | None = None) -> PackageSet:
        """Install these packages, with `anew` also if they are known, in turn with those of other owners. What must run
        code to be installed does so with `build`. The tools' output is passed to `say` as it comes. When this returns,
        the set is in the blob store too. Raises SetupFailed."""
        ...

    def get(self, digest: str) -> PackageSet | None:
        """The set of this digest, None if it isn't on this machine. Reads one file."""
        ...

    async def ensure(self, digest: str) -> bool:
        """Have this set on this machine, from the blob store if need be. False if it isn't there either. Immediate if
        it's on this machine already. Raises OSError."""
        ...

    def sweep(self, keep: set[str], older_than: float, free_before: float) -> int:
        """Remove the sets that aren't in `keep` and were last made or found before `older_than` (seconds since the
        epoch). Of those made or found before `free_before`, the oldest go, too, until the others aren't large. Returns
        how many went."""
        ...


class InstalledPackageSets:
    """Brings package sets back to this machine where a sandbox or a capsule needs them. A set that is lost for good is
    installed once more."""

    def __init__(self, store: MetadataStore, installer: Installer) -> None:
        self._store, self._installer = store, installer

    async def ensure(self, digest: str) -> None:
        """Have this set on this machine. Raises Unavailable where that isn't possible now."""
        try:
            if await self._installer.ensure(digest):
                return
        except OSError as error:
            why = error.strerror or str(error)
            raise Unavailable(f"The session's packages could not be brought back: {why}.") from error
        log.warning("package_set_lost", digest=digest)
        await self._store.package_set_lost(digest)
        raise Unavailable(
            "The session's packages were lost on this server, and are being installed once more.",
            hint="Try again: a run waits until they are there.",
        )

    def lock(self, session: Session) -> JsonObject | None:
        """The lock of a session's package set if that is on this machine, else the lock by which it is still to be
        made. None if there is none that may go into a capsule. Reads a file."""
        installed = self._installer.get(session.package_set) if session.package_set else None
        lock: JsonObject | None = json.loads(session.setup_lock) if session.setup_lock else None
        if installed is not None:
            lock = {kind: list(getattr(installed, kind)) for kind in KINDS}
        # A package may call itself anything.
        return lock if can_be_lock(lock) else None
