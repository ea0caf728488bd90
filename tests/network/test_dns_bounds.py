"""How much a run's nameserver asks for, of the machine's own."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest

from era.core.allowlist import allowlist
from era.core.shares import Shares
from era.network import dns
from era.network.descriptors import RunDescriptors
from tests.network import world
from tests.network.test_messages import query


class Nameserver:
    """The machine's, which takes a moment."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked = self.now = self.most = 0
        patch.setattr(dns, "_ask_udp", self.ask)
        patch.setattr(dns, "_ask_tcp", self.ask)

    async def ask(self, _: object, message: bytes) -> bytes:
        self.asked += 1
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.001)
        self.now -= 1
        return world.resolved(message)


def names(descriptors: int = 10_000) -> dns.Names:
    return dns.Names(allowlist([]), lambda _: None, RunDescriptors(Shares(descriptors), "me"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("bounded", [True, False])
async def test_so_many_a_second(monkeypatch: pytest.MonkeyPatch, *, bounded: bool, stream: bool) -> None:
    nameserver, one = Nameserver(monkeypatch), names()
    monkeypatch.setattr(dns, "_PER_SECOND", 10)
    if not bounded:
        monkeypatch.setattr(one, "_slots", asyncio.Semaphore(10_000))
        monkeypatch.setattr(one._pace, "step", lambda: asyncio.sleep(0))
    begun = time.monotonic()
    lookups = [asyncio.create_task(one._resolve(query("a.test"), stream=stream)) for _ in range(500)]
    await asyncio.sleep(0.5)
    assert (nameserver.asked <= 10 * (1 + time.monotonic() - begun) + 1) == bounded
    assert (nameserver.most <= dns._MAX_LOOKUPS) == bounded
    for lookup in lookups:
        lookup.cancel()
    await asyncio.gather(*lookups, return_exceptions=True)
    assert one._descriptors._held == 0


async def test_what_comes_at_once_is_answered_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    nameserver, one = Nameserver(monkeypatch), names()
    inside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    inside.bind(("127.0.0.1", 0))
    ended: list[bool] = []
    close = one.serve_datagrams(inside, lambda: ended.append(True))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as program:
        program.connect(inside.getsockname())
        for number in range(90):
            program.send(query(f"n{number}.test"))
        answers = {await asyncio.wait_for(asyncio.get_running_loop().sock_recv(program, 4096), 10) for _ in range(90)}
    assert len(answers) == 90
    assert nameserver.most <= dns._MAX_LOOKUPS
    close()
    assert ended == [True]


async def test_without_descriptors_the_answer_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    nameserver = Nameserver(monkeypatch)
    answer = await names(0)._resolve(query("a.test"), stream=False)
    assert (nameserver.asked, answer[3] & 15) == (0, 2)
