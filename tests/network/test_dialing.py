"""Lookups of names, of which each has a thread of its own."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from ipaddress import ip_address
from typing import Any

import pytest

from era.network.dialing import resolve
from tests.conftest import eventually

HANGING = 64
ENDS = """
import asyncio, socket, time
from era.network.dialing import resolve
socket.getaddrinfo = lambda *_, **__: time.sleep(60)
async def main():
    try:
        async with asyncio.timeout(0.1): await resolve("slow.test", 80)
    except TimeoutError: print("not waited for")
asyncio.run(main())
"""


async def test_names_that_hang_keep_no_other_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    answered, look = threading.Event(), socket.getaddrinfo

    def slow(host: str, *rest: Any, **more: Any) -> Any:
        if host == "slow.test":
            answered.wait(60)
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return look(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    hanging = [asyncio.create_task(resolve("slow.test", 443)) for _ in range(HANGING)]
    try:
        async with asyncio.timeout(30):
            assert ip_address("127.0.0.1") in await resolve("127.0.0.1", 80)
            await asyncio.get_running_loop().getaddrinfo("127.0.0.1", 80)  # another one of the event loop's
        hanging[0].cancel()
        assert not any(task.done() for task in hanging[1:])
    finally:
        answered.set()
    ended = await asyncio.gather(*hanging, return_exceptions=True)
    assert isinstance(ended[0], asyncio.CancelledError)
    assert all(isinstance(error, socket.gaierror) for error in ended[1:])
    assert eventually(lambda: all(thread.name != "era-resolve" for thread in threading.enumerate()))


async def test_what_is_no_name_is_told_as_such() -> None:
    with pytest.raises(UnicodeError):
        await resolve("x" * 70 + ".test", 80)


def test_a_process_ends_while_a_name_hangs() -> None:
    ended = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=50, check=True)
    assert ended.stdout == "not waited for\n"
