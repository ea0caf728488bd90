"""The service's descriptors that one run's connections take."""

from __future__ import annotations

import errno
from collections.abc import Callable

from era.core.concurrency.shares import Shares

MAX_DESCRIPTORS = 2048
"""Of one run, however many there are."""


class RunDescriptors:
    """What one run may take of its owner's share of the service's descriptors: at most as many as are left to the
    owner. So neither a run nor an owner can take all of them, and a run that comes later finds some.

    Datagrams have no end that could be seen. So what is open for them is known here by when it was used last, and what
    was used least lately is given up when this run wants more than it may have. Never that of another run."""

    def __init__(self, shares: Shares[str], owner: str) -> None:
        self._shares, self._owner = shares, owner
        self._held = 0
        self._lasting: dict[Callable[[], None], None] = {}
        """The functions that give up what is open without an end. What was used least lately comes first."""

    def take(self, count: int = 1) -> None:
        """Raises OSError (ENOBUFS) where nothing that could be given up makes room."""
        while not self.take_free(count):
            if not self._lasting:
                raise OSError(errno.ENOBUFS, "this run has too many connections")
            next(iter(self._lasting))()

    def take_free(self, count: int = 1) -> bool:
        """Take so many if that is possible without giving anything up."""
        if self._held + count > min(MAX_DESCRIPTORS, self._shares.left(self._owner)):
            return False
        self._held += count
        return self._shares.take(self._owner, count)

    def give_back(self, count: int = 1) -> None:
        self._held -= count
        self._shares.give_back(self._owner, count)

    def used(self, give_up: Callable[[], None]) -> None:
        """What this function gives up has been used just now. The function calls `ended`."""
        self._lasting.pop(give_up, None)
        self._lasting[give_up] = None

    def ended(self, give_up: Callable[[], None]) -> None:
        """It was given up."""
        self._lasting.pop(give_up, None)
