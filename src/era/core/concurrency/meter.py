"""The meter: what work costs the event loop, and who waits when he has had more than his share of it.

Theory of operation. One loop serves everybody, and bytes from outside decide how much work they are: 64 KiB are one
piece of a body or ten thousand. So cost is measured. Behind all work is an *account*, an owner and one of his sessions,
which tasks inherit from whoever starts them. Each step of each task is timed, in the time of the loop's thread on a
processor, and so are callbacks that parse (`charged`).

An account that owes more than a slice waits at marked points: `await turn()`, before the next request, piece, message
or frame. It pays a slice by each iteration of the loop that it waits for, and one account at a time pays, in turn by
owner and session (`FairLimiter`). So however much is behind an account, an iteration takes little longer than a slice,
and others wait for a few iterations at most. All tasks of one account pay one after another: of very many that are
woken at once a few go on in each iteration.

What a step costs at most is for others to bound: by sizes, before they parse, or by work on threads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Generator, Hashable
from contextvars import ContextVar
from typing import Any
from weakref import WeakValueDictionary

from era.core.concurrency.fair_limiter import FairLimiter

SLICE = 0.001
"""Seconds of the loop's time that an account may owe before it waits."""

_PAID_BY_TIME = 0.25
"""Seconds of debt that a second pays by passing: as much of the loop may be used without ever waiting."""


class Account:
    """Whoever is behind work: an owner and one of his sessions, or an address and one of its connections."""

    __slots__ = ("__weakref__", "debt", "owner", "paid_at", "paying", "session")

    def __init__(self, owner: str, session: Hashable = "") -> None:
        self.owner, self.session = owner, session
        self.debt = 0.0
        """Seconds of the loop's time."""

        self.paid_at = time.monotonic()
        """Until when time has paid."""

        self.paying = asyncio.Lock()
        """Held by the task that pays. The others wait for it in order of arrival."""


current: ContextVar[Account | None] = ContextVar("account", default=None)
"""The account that pays for what the task under way does; None is the service's own."""


class Meter:
    """Times the steps of one event loop's tasks."""

    def __init__(self) -> None:
        self.accounts: WeakValueDictionary[tuple[str, Hashable], Account] = WeakValueDictionary()
        """By owner and session, for as long as anything goes on at their cost."""

        self._own = Account("")
        self.paying = FairLimiter(1)
        """Who pays in this iteration of the loop."""

        self._since = self._step_at = 0.0
        """From when on the step under way isn't charged yet, by the thread's clock, and its begin by the wall's."""

        self._began: float | None = None
        """When something first began in this iteration, by the same clock."""

    def begin_step(self) -> None:
        self._since = time.thread_time()
        self._step_at = time.monotonic()

    def settle(self) -> Account:
        """Charge what the step under way has cost until now. Returns the account that is charged."""
        now = time.thread_time()
        payer = current.get() or self._own
        payer.debt += now - self._since
        self._since = now
        return payer

    def is_in_debt(self, payer: Account) -> bool:
        """Whether an account owes more than a slice. Time has paid a part, but not that of this step, in which
        nobody else had a turn."""
        if self._step_at > payer.paid_at:
            payer.debt = max(payer.debt - (self._step_at - payer.paid_at) * _PAID_BY_TIME, 0.0)
            payer.paid_at = self._step_at
        return payer.debt > SLICE

    def must_wait(self, payer: Account, *, begins: bool) -> bool:
        """Whether work of an account has to wait: the account owes more than a slice, other tasks of it are paying, or
        something new would begin (`begins`) in an iteration of the loop that has cost a slice already."""
        return self.is_in_debt(payer) or payer.paying.locked() or (begins and self.is_used_up())

    def is_used_up(self) -> bool:
        """Whether this iteration of the loop has cost a slice since something first began in it. If nothing has begun
        in it yet, something does now."""
        if self._began is None:
            self._began = self._since
            asyncio.get_running_loop().call_soon(self._reset)
        return self._since - self._began > SLICE

    def _reset(self) -> None:
        self._began = None

    def task(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any
    ) -> asyncio.Task[Any]:
        """A task factory, see asyncio."""
        return asyncio.Task(_Timed(coro, self), loop=loop, **options)


class _Timed(Coroutine[Any, Any, Any]):
    """A coroutine whose steps are charged to the account that is current when they end. It has the attributes of the
    coroutine itself, for debuggers and tracebacks."""

    __slots__ = ("_coro", "_meter")

    def __init__(self, coro: Coroutine[Any, Any, Any], meter: Meter) -> None:
        self._coro, self._meter = coro, meter

    def send(self, value: Any) -> Any:
        self._meter.begin_step()
        try:
            return self._coro.send(value)
        finally:
            self._meter.settle()

    def throw(self, *error: Any) -> Any:
        self._meter.begin_step()
        try:
            return self._coro.throw(*error)
        finally:
            self._meter.settle()

    def close(self) -> None:
        self._coro.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coro.__await__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coro, name)


def install() -> None:
    """Time the tasks of the running event loop that are made from now on."""
    asyncio.get_running_loop().set_task_factory(Meter().task)


def _running() -> Meter | None:
    """Return the meter of the running event loop, whose tasks it makes, if it has one."""
    meter = getattr(asyncio.get_running_loop().get_task_factory(), "__self__", None)
    return meter if isinstance(meter, Meter) else None


def account(owner: str, session: Hashable = "") -> Account:
    """Return the one account of this owner and session."""
    meter = _running()
    if meter is None:
        return Account(owner, session)
    return meter.accounts.get((owner, session)) or meter.accounts.setdefault((owner, session), Account(owner, session))


def known_account(owner: str, session: str) -> Account:
    """Return the account of a session with work under way, or else that of its owner alone: a caller that makes up
    names of sessions must not get an account for each."""
    meter = _running()
    known = None if meter is None else meter.accounts.get((owner, session))
    return known or account(owner)


def charge_to(owner: str, session: str) -> None:
    """Charge what the task under way does, and those that it starts from now on, to a session."""
    current.set(account(owner, session))


def charged(payer: Account, callback: Callable[..., None], *arguments: Any) -> None:
    """Call back, at the cost of this account, as the tasks are that are made by it."""
    current.set(payer)
    meter = _running()
    if meter is None:
        callback(*arguments)
        return
    meter.begin_step()
    try:
        callback(*arguments)
    finally:
        meter.settle()


def owes(*, begins: bool = False) -> bool:
    """Whether `turn` would wait."""
    meter = _running()
    return meter is not None and meter.must_wait(meter.settle(), begins=begins)


async def turn(*, begins: bool = False) -> None:
    """Wait until the current account has paid what it owes of the loop's time.

    Args:
        begins: Whether something new begins here, such as a request. That also waits where what has begun in this
            iteration of the loop has cost a slice already, whoever it is of: so of a burst a few begin in each.
    """
    meter = _running()
    if meter is None:
        return
    payer = meter.settle()
    if not meter.must_wait(payer, begins=begins):
        return
    async with payer.paying:
        while True:
            async with meter.paying.slot(payer.owner, payer.session):
                await asyncio.sleep(0)
            payer.debt -= SLICE
            if not meter.is_in_debt(payer):
                return
