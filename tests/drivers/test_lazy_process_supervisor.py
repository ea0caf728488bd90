"""The process supervisor of a sandbox, where who wants it gives up while it is made."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import Any

import pytest

from era.drivers.process_supervisor import LazyProcessSupervisor
from era.errors import SandboxFailed

READY = b"Y" + bytes(8)


class Guest:
    """What stands in for supervisors, each of which is told to start; see also process_supervisor.Life."""

    pid = 0

    def __init__(self) -> None:
        self.begun, self.may_start = asyncio.Event(), asyncio.Event()
        self.fails = False
        self.sockets: list[socket.socket] = []
        self.is_watched = False

    async def enter(self, control: int) -> Guest:
        self.sockets.append(theirs := socket.socket(fileno=os.dup(control)))
        self.begun.set()
        await self.may_start.wait()
        if self.fails:
            raise SandboxFailed("not today")
        theirs.sendall(READY)
        return self

    def begin_processes(self) -> None: ...

    def begin_anew(self) -> None: ...

    def set_processes(self, are_there: bool) -> None:
        self.is_watched = are_there

    def kill(self) -> None:
        for each in self.sockets:
            each.close()

    async def ended(self) -> None: ...


def beside(guest: Any) -> LazyProcessSupervisor:
    return LazyProcessSupervisor(guest.enter, {}, guest, guest, str, lambda: None, lambda: 0.0, sandbox_broker=guest)


async def give_up(supervisor: LazyProcessSupervisor, guest: Guest) -> None:
    """Want one, and be cancelled while it is made."""
    wanting = asyncio.create_task(supervisor.get())
    await guest.begun.wait()
    wanting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await wanting


async def made(supervisor: LazyProcessSupervisor) -> None:
    assert supervisor._making is not None
    await asyncio.wait([supervisor._making])


@pytest.mark.parametrize("is_there", [True, False], ids=["it is there by then", "it is still made"])
async def test_who_comes_next_gets_what_was_made_for_somebody_who_gave_up(*, is_there: bool) -> None:
    guest = Guest()
    lazy = beside(guest)
    await give_up(lazy, guest)
    guest.may_start.set()
    if is_there:
        await made(lazy)
    got = await lazy.get()
    assert len(guest.sockets) == 1, "another was made, and the first lives on"
    assert got is lazy.supervisor
    assert guest.is_watched
    await lazy.close()
    assert not got.alive
    assert not guest.is_watched


async def test_one_that_failed_for_somebody_who_gave_up_is_made_anew() -> None:
    guest = Guest()
    guest.fails = True
    lazy = beside(guest)
    await give_up(lazy, guest)
    guest.may_start.set()
    await made(lazy)
    guest.fails = False
    assert (await lazy.get()).alive
    await lazy.close()
    with pytest.raises(SandboxFailed):
        await lazy.get()
