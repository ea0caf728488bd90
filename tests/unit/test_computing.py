"""What takes long in Python and is done for an owner as often as he asks: neither the watches of runs nor other owners
wait for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from era.api import http
from era.core.models import OwnedId
from era.core.public import relay
from era.core.sessions import versions
from era.core.sessions.versions import Versions

_AT_ONCE = 9


def diff(owner: str) -> Awaitable[Any]:
    async def version(*_: object) -> Any:
        return SimpleNamespace(data="{}", version=SimpleNamespace(snapshot=None))

    unused: Any = None
    store: Any = SimpleNamespace(version=version)
    return Versions(store, unused, unused, unused, unused, unused).diff(OwnedId(owner, "s"), 1)


def nearest(owner: str) -> Awaitable[Any]:
    return http._nearest_id(owner, "missing", ["missin"])


def relayed(owner: str) -> Awaitable[Any]:
    unused: Any = None
    return relay._described_by(unused, b"{" * (relay._IN_THREAD + 1), unused, owner)


CALLS: dict[str, tuple[Callable[[str], Awaitable[Any]], Any, str]] = {
    "diff": (diff, versions, "_changes"),
    "nearest": (nearest, http, "nearest"),
    "relay": (relayed, relay, "_read"),
}
"""By what asks for it: a call for an owner, and the name of what takes long in its module."""


def on_loops_threads(_: str, job: Callable[..., Any], *arguments: Any, session: Hashable = "") -> Awaitable[Any]:
    return asyncio.to_thread(job, *arguments)


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
@pytest.mark.parametrize("kind", CALLS)
async def test_an_owner_takes_no_thread_of_the_watches_and_one_of_two(
    kind: str, weakened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, module, name = CALLS[kind]
    if weakened:
        monkeypatch.setattr(module, "computing", on_loops_threads)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(3))
    end, begun, loop = threading.Event(), asyncio.Queue[None](), asyncio.get_running_loop()

    def takes_long(*_: object) -> None:
        loop.call_soon_threadsafe(begun.put_nowait, None)
        end.wait()

    monkeypatch.setattr(module, name, takes_long)
    calls = [asyncio.ensure_future(call("greedy")) for _ in range(_AT_ONCE)]
    try:
        for _ in range(3 if weakened else 1):
            await begun.get()
        watch = asyncio.create_task(asyncio.to_thread(threading.get_ident))
        calls.append(asyncio.ensure_future(call("other")))
        if weakened:
            await asyncio.sleep(0.01)
            assert not watch.done(), "all threads are taken"
        else:
            async with asyncio.timeout(60):
                await watch
                await begun.get()
        assert begun.empty()
    finally:
        end.set()
        await asyncio.gather(*calls, watch)
