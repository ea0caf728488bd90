"""Notes: which package set a list of requirements came to, and what the tools wrote then.

Hosts of a cluster have them in the directory that they share. So nothing here knows whether a set is on this machine.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from era.core.setup.package_sets import PackageSet

_DIGEST = "environment"
"""The field of a note that has the digest; its name is older than the word package set."""


@dataclass(frozen=True, slots=True)
class Note:
    """What is noted of a request for packages."""

    digest: str
    stdout: str
    stderr: str


class Notes:
    """A directory of notes, by the key of a request. `open` it first."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def open(self) -> None:
        """Raises OSError."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory.chmod(0o700)

    def find(self, key: str) -> Note | None:
        """None where there is no note, or none that can be read."""
        try:
            note = json.loads((self._directory / key).read_text())
            return Note(note[_DIGEST], note["stdout"], note["stderr"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def renew(self, key: str) -> None:
        """Count a note as written now. Raises OSError."""
        os.utime(self._directory / key)

    def write(self, key: str, made: PackageSet) -> None:
        """Note what a request came to. Raises OSError."""
        temporary = self._directory / f"{key}.{secrets.token_hex(8)}"
        temporary.write_text(json.dumps({_DIGEST: made.digest, "stdout": made.stdout, "stderr": made.stderr}))
        temporary.rename(self._directory / key)

    def sweep(self, here: Collection[str], older_than: float) -> None:
        """Remove notes that were last written or renewed before that, unless they name a package set that is here."""
        for path in self._directory.iterdir():
            with suppress(OSError):
                note = self.find(path.name)
                if path.stat().st_mtime < older_than and (note is None or note.digest not in here):
                    path.unlink()
