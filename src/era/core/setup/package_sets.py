"""Package sets: what setups have installed, shared read-only by every session that asks for the same packages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from era.core.metadata import MetadataStore
from era.core.models import JsonObject, Session
from era.core.setup import locks
from era.core.setup.builds import Build
from era.core.setup.progress import Say
from era.core.setup.requirements import Packages
from era.errors import Unavailable

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
            lock = {kind: list(getattr(installed, kind)) for kind in locks.KINDS}
        # A package may call itself anything.
        return lock if locks.can_be_lock(lock) else None
