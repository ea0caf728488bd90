"""Slots for work, which those who wait get in turn, whoever has come with how much."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager


class WaitedSlots[Holder](ABC):
    """Slots that are waited for."""

    @abstractmethod
    async def take(self, holder: Holder) -> None:
        """Wait for a slot, which must be given back."""

    @abstractmethod
    def give_back(self, holder: Holder) -> None:
        """Give back a slot that this holder has."""

    @asynccontextmanager
    async def slot(self, holder: Holder) -> AsyncIterator[None]:
        """Wait for a slot, and have it for the block."""
        await self.take(holder)
        try:
            yield
        finally:
            self.give_back(holder)


class FairSlots[Holder: Hashable](WaitedSlots[Holder]):
    """A bounded number of slots. Each holder has a queue of its own, and a free slot goes to the next queue in a round.

    So one holder with much to do delays others by what is being done, never by what it has queued."""

    def __init__(self, most: int, most_each: int) -> None:
        """`most_each` is how many one holder may have at a time, though others are free."""
        self._free = most
        self._most_each = most_each
        self._held: Counter[Holder] = Counter()
        self._queues: dict[Holder, deque[asyncio.Future[None]]] = {}
        """In the order of the round: who got a slot goes to the end."""

    @property
    def is_idle(self) -> bool:
        """Whether nobody has a slot or waits for one."""
        return not self._held and not self._queues

    async def take(self, holder: Holder) -> None:
        if self._free and not self._queues and self._held[holder] < self._most_each:
            self._free -= 1
            self._held[holder] += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(holder, deque()).append(turn)
        self._hand_out()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._hand_out()  # which forgets it
            else:
                self.give_back(holder)
            raise

    def give_back(self, holder: Holder) -> None:
        self._free += 1
        self._held[holder] -= 1
        if not self._held[holder]:
            del self._held[holder]
        self._hand_out()

    def _hand_out(self) -> None:
        """Give free slots to those whose turn it is."""
        for holder, queue in list(self._queues.items()):
            if not self._free:
                break  # thousands may wait; those who have gone are forgotten when there is a slot
            while queue and queue[0].done():  # cancelled
                queue.popleft()
            if queue and self._held[holder] < self._most_each:
                self._free -= 1
                self._held[holder] += 1
                queue.popleft().set_result(None)
                self._queues[holder] = self._queues.pop(holder)
            if not queue:
                del self._queues[holder]


class OwnersSlots[Holder: Hashable](WaitedSlots[tuple[str, Holder]]):
    """A bounded number of slots shared twice: by owners in turn, and each owner's by his members (sessions, say) in
    turn. A holder is an owner and a member of his."""

    def __init__(self, most: int, most_of_owner: int, most_each: int) -> None:
        """`most_each` is how many one member may have at a time."""
        self._most_of_owner, self._most_each = most_of_owner, most_each
        self._owners: FairSlots[str] = FairSlots(most, most_of_owner)
        self._shares: dict[str, FairSlots[Holder]] = {}
        """By owner, as long as he has slots or waits for some: whose turn it is among his members."""

    async def take(self, holder: tuple[str, Holder]) -> None:
        owner, member = holder
        share = self._shares.setdefault(owner, FairSlots(self._most_of_owner, self._most_each))
        try:
            await share.take(member)
            try:
                await self._owners.take(owner)
            except BaseException:
                share.give_back(member)
                raise
        except BaseException:
            self._forget(owner)
            raise

    def give_back(self, holder: tuple[str, Holder]) -> None:
        owner, member = holder
        self._owners.give_back(owner)
        self._shares[owner].give_back(member)
        self._forget(owner)

    def _forget(self, owner: str) -> None:
        """Forget an owner's share if nobody needs it."""
        share = self._shares.get(owner)
        if share is not None and share.is_idle:
            del self._shares[owner]
