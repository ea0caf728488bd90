"""What the helpers for a live session's files say is input from the sandbox, and may come late."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from era.core.files import watching
from era.core.files.current_files import _listed
from era.core.live import file_helper
from era.core.live.file_helper import FileHelper, _taken, entry_of, number_of
from era.core.process import ProcessEnded, ProcessOutput
from era.errors import Unavailable

GOOD: dict[str, Any] = {"type": "file", "size": 1, "mode": 0o644, "mtime_ns": 5, "etag": "0" * 64}


def frame(head: bytes, body: bytes = b"") -> bytearray:
    return bytearray(len(head).to_bytes(4, "big") + len(body).to_bytes(4, "big") + head + body)


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "device"},
        {"type": ["file"]},
        {"size": -1},
        {"size": 1 << 63},
        {"size": True},
        {"size": "1"},
        {"mode": None},
        {"mtime_ns": 1 << 90},
        {"etag": '"\r\nX: y'},
        {"etag": "0" * 63 + "\n"},
        {"link": 5},
        {"link": "\ud800"},
    ],
)
def test_an_entry_of_no_form_is_refused(wrong: dict[str, Any]) -> None:
    assert entry_of(("a",), GOOD).size == 1
    with pytest.raises(Unavailable):
        entry_of(("a",), {**GOOD, **wrong})


def test_a_path_that_no_bytes_make_is_refused() -> None:
    with pytest.raises(Unavailable):
        entry_of(("\ud800",), GOOD)


def test_numbers_are_numbers() -> None:
    assert number_of({"handle": 3}, "handle") == 3
    for wrong in ({}, {"handle": "3"}, {"handle": 1.5}, {"handle": True}, {"handle": 1 << 100}):
        with pytest.raises(Unavailable):
            number_of(wrong, "handle")


@pytest.mark.parametrize("wrong", [frame(b"[]"), frame(b"{}"), frame(b'{"id": "1"}'), frame(b"{"), frame(b"\xff")])
def test_an_answer_of_no_form_is_refused(wrong: bytearray) -> None:
    with pytest.raises(ValueError, match=r"form|Expecting|codec"):
        _taken(wrong)


def test_an_answer_is_taken_once_it_is_all_there() -> None:
    whole = frame(b'{"id": 1}', b"body")
    assert _taken(whole[:-1]) is None
    assert _taken(whole) == ({"id": 1}, b"body")
    assert not whole


def test_a_large_answer_is_refused_before_it_is_there() -> None:
    with pytest.raises(ValueError, match="too large"):
        _taken(bytearray(b"\xff" * 8))


class Live:
    """The part of a live session that helpers are asked through."""

    def __init__(self, process: Any = None, cpu_seconds: Callable[[], float] = lambda: 0.0) -> None:
        self.sandbox = self
        self.is_open = True
        self.cpu_seconds = cpu_seconds
        self._process = process

    async def supervisor(self) -> Live:
        return self

    async def start(self, _: object) -> Any:
        return self._process


class SlowHelper:
    """A process that answers what it is sent only after `seconds`."""

    def __init__(self, answer: bytes, seconds: float) -> None:
        self._answer, self._seconds = answer, seconds
        self._asked = asyncio.Event()
        self.was_killed = asyncio.Event()

    async def send(self, _: bytes) -> None:
        self._asked.set()

    async def events(self) -> AsyncIterator[ProcessOutput | ProcessEnded]:
        await self._asked.wait()
        await asyncio.wait([asyncio.ensure_future(self.was_killed.wait())], timeout=self._seconds)
        if not self.was_killed.is_set():
            yield ProcessOutput("channel", self._answer)
            await self.was_killed.wait()
        yield ProcessEnded(137, 9, "signal")

    async def kill(self) -> None:
        self.was_killed.set()


@pytest.mark.parametrize("gets_on", [True, False])
async def test_a_helper_is_ended_only_where_its_sandbox_does_not_get_on(
    monkeypatch: pytest.MonkeyPatch, gets_on: bool
) -> None:
    """As on a machine whose processors are taken. All callers share it."""
    monkeypatch.setattr(file_helper, "_SECONDS", 0.2)
    process: Any = SlowHelper(bytes(frame(b'{"id": 1, "made": true}')), 0.6 if gets_on else 600.0)
    helper = FileHelper(process, time.monotonic if gets_on else lambda: 0.0)
    if gets_on:
        found, _ = await helper.call("put")
        assert found["made"]
        assert helper.alive
        await helper.end()
    else:
        with pytest.raises(Unavailable):
            await helper.call("put")
        assert process.was_killed.is_set()


@pytest.mark.parametrize("gets_on", [True, False])
async def test_a_watch_is_given_up_only_where_its_sandbox_does_not_get_on(
    monkeypatch: pytest.MonkeyPatch, gets_on: bool
) -> None:
    monkeypatch.setattr(watching, "_SECONDS", 0.2)
    process = SlowHelper(json.dumps({"type": "watching"}).encode() + b"\n", 0.6 if gets_on else 600.0)
    live: Any = Live(process, time.monotonic if gets_on else lambda: 0.0)
    ended = asyncio.Event()
    watch = watching._LiveWatch(live, (), recursive=False, ended=ended.set)
    if gets_on:
        await watch.begun()
        watch.end()
    else:
        with pytest.raises(Unavailable):
            await watch.begun()
    await ended.wait()
    assert process.was_killed.is_set()


def test_a_head_of_many_values_is_refused_before_it_is_there() -> None:
    """It is parsed in the event loop. The longest of an honest helper is within the bound."""
    with pytest.raises(ValueError, match="too large"):
        _taken(frame(b'{"id": 1, "a": [' + b"1," * 40_000 + b"1]}")[:100])
    longest = json.dumps({**GOOD, "type": "link", "link": "\udcff" * 4096, "id": 1}).encode()
    assert _taken(frame(longest)) == (json.loads(longest), b"")


def test_a_list_of_too_many_values_is_refused() -> None:
    body = json.dumps([{**GOOD, "path": ["d", "\udcff"]}] * 3).encode()
    assert [entry.path for entry in _listed(body, 2)] == ["d/\udcff"] * 2
    for wrong in (
        body[:-2] + b', "more": [' + b"1," * 800_000 + b"1]}]",
        b"[" * 100_000,
        b"{}",
        b"[{}]",
        b"[" + b"9" * 5000 + b"]",
    ):
        with pytest.raises(Unavailable):
            _listed(wrong, 2)


class DyingHelper:
    """A process that ends as soon as it has been sent a request."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()

    async def send(self, _: bytes) -> None:
        self._asked.set()

    async def events(self) -> AsyncIterator[ProcessEnded]:
        await self._asked.wait()
        yield ProcessEnded(137, 9, "signal")

    async def kill(self) -> None: ...


@pytest.mark.parametrize("op", ["stat", "write", "delete", "move", "put", "place", "mkdir"])
async def test_nobody_is_told_to_repeat_what_may_have_been_done(op: str) -> None:
    process: Any = DyingHelper()
    helper = FileHelper(process, lambda: 0.0)
    with pytest.raises(Unavailable) as caught:
        await helper.call(op)
    may_have_changed = op not in ("stat", "write")
    assert (caught.value.retry_after is None, "not known" in caught.value.message) == (may_have_changed,) * 2
    assert caught.value.code == "no_live_files"
    with pytest.raises(Unavailable) as caught:
        await helper.call(op)  # now it surely does nothing
    assert caught.value.retry_after == 1
