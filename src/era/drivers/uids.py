"""uids of sandboxes: one each, of a range that belongs to one driver."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

FIRST_UID = 1_900_000_000
"""Sandboxes of a root service take uids from here on: above those of people, containers and systemd."""

UIDS, _RANGES = 100_000, 2_400
"""The uids of one driver, and the number of such ranges. The data directory decides which range a driver has, so that
two services on one machine share none. All are below 2**31, since bubblewrap takes no larger ones."""


class Uids:
    """The uids of one driver's sandboxes."""

    def __init__(self, directory: Path) -> None:
        """`directory` is the service's."""
        self.are_own = os.geteuid() == 0
        """Whether sandboxes have uids of their own."""

        first = FIRST_UID + int(hashlib.sha256(bytes(directory)).hexdigest(), 16) % _RANGES * UIDS
        self._unused = iter(range(first, first + UIDS))
        self._free: list[int] = []

    def take(self) -> int | None:
        """A uid that no sandbox and no file has; None for a service that isn't root, whose sandboxes have its own."""
        if not self.are_own:
            return None
        return self._free.pop() if self._free else next(self._unused)

    def give_back(self, uid: int | None) -> None:
        """Nothing is left of what had this uid."""
        if uid is not None:
            self._free.append(uid)
