"""JSON of very many values is refused before it is parsed: they would hold up others, and fill the memory."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest

from era.core import jsontext
from era.core.live import kernel_frames
from era.core.live.kernel_frames import KernelBroken
from tests.soaking import soak_the_rest

_BYTES = 16 << 20
MANY = {
    "numbers": b"[" + b"1," * (_BYTES // 2) + b"1]",
    "lists": b"[" + b"[]," * (_BYTES // 3) + b"1]",
    "strings": b"[" + b'"",' * (_BYTES // 3) + b"1]",
    "keys": b"{" + b'"a":1,' * (_BYTES // 6) + b'"a":1}',
}


@pytest.mark.parametrize("kind", soak_the_rest(MANY, ["numbers", "keys"]))
@pytest.mark.parametrize("weakened", soak_the_rest([False, True], 1), ids=["", "weakened"])
def test_many_values_are_refused(kind: str, weakened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if weakened:
        monkeypatch.setattr(jsontext, "has_too_many_parts", lambda _: False)
        assert len(jsontext.loads(MANY[kind])) > 0
        return
    tracemalloc.start()
    began = time.thread_time()
    try:
        with pytest.raises(jsontext.JsonTooLarge):
            jsontext.loads(MANY[kind])
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert time.thread_time() - began < 5


def long_integers(count: int, digits: int) -> bytes:
    return b"[" + b",".join([b"9" * digits] * count) + b"]"


def test_long_integers_are_bounded_together() -> None:
    """To read and to write one takes the square of its digits: 16 MiB of the longest took seconds."""
    assert len(jsontext.loads(long_integers(64, 4000))) == 64
    assert len(jsontext.loads(long_integers(10_000, 300))) == 10_000
    with pytest.raises(jsontext.JsonTooLarge, match="256000 digits"):
        jsontext.loads(long_integers(65, 4000))
    with pytest.raises(KernelBroken):
        kernel_frames.parse(b'{"data":' + long_integers(65, 4000) + b"}")
    assert len(jsontext.loads(json.dumps(["9" * 4000] * 65).encode())) == 65, "what is in strings doesn't count"


def test_many_parts_are_counted_in_steps() -> None:
    """A thread that counts them lets others in at each: it was one step, however long the text."""
    steps = 0

    def step(*_: object) -> None:
        nonlocal steps
        steps += 1

    for text, is_too_much in ((MANY["strings"], True), (json.dumps([":" * 2_000_000]).encode(), False)):
        sys.setprofile(step)
        try:
            assert jsontext.has_too_many_parts(text) is is_too_much
        finally:
            sys.setprofile(None)
    assert steps > 100


def test_marks_are_strings_commas_colons_and_opening_brackets() -> None:
    for text in (b"", b'{"a":[1,2]}', b"]}" * 5, MANY["keys"], MANY["numbers"] + b"   "):
        assert jsontext.marks(text) == sum(map(text.count, (b",", b":", b"[", b"{", b'"')))


def test_exactly_the_most_parts_are_taken() -> None:
    most = b"[" + b"1," * (jsontext._MAX_PARTS - 1) + b"1]"
    assert not jsontext.has_too_many_parts(most)
    assert jsontext.has_too_many_parts(b"[" + most)


LARGE = {
    "text of all that counts": json.dumps({"code": '[{,:"\\' * 400_000}),
    "the most data": json.dumps({"data": [[]] * 340_000}, separators=(",", ":")),
    "data of empty texts": json.dumps({"data": [""] * 340_000}, separators=(",", ":")),
    "data of keys": json.dumps({"data": [{"": ""}] * 100_000}, separators=(",", ":")),
}


@pytest.mark.parametrize("kind", LARGE)
def test_long_texts_and_large_data_are_taken(kind: str) -> None:
    """What is in strings doesn't count, and no state file that may be that large has too many."""
    assert jsontext.loads(LARGE[kind].encode()) == json.loads(LARGE[kind])


def nested(value: object, levels: int) -> object:
    for _ in range(levels):
        value = [value]
    return value


DEEP: dict[str, dict[str, object]] = {
    "a short list far down": {"a": nested([0] * 32_600, 62)},
    "a long list far down": {"a": nested([0] * 450_000, 60)},
    "many deep lists": {"a": [nested(1, 60)] * 8_000},
    "keys": {"a": nested([{"": 0}] * 100_000, 40)},
}


@pytest.mark.parametrize("kind", soak_the_rest(DEEP, ["a short list far down", "keys"]))
def test_a_state_file_is_no_longer_than_it_may_be(kind: str) -> None:
    """With indentation it would be up to 60 MiB, and no run of the session could be kept."""
    stored = jsontext.data_text(DEEP[kind])
    content, indented = jsontext.state_file(stored), len(json.dumps(DEEP[kind], indent=2))
    assert len(content) <= jsontext.MAX_STATE_BYTES < indented
    is_whole = json.loads(content) == DEEP[kind]
    assert is_whole


def test_an_ordinary_state_file_is_indented() -> None:
    data: dict[str, object] = {"people": [{"name": f"Ä{number}", "tags": ["a", "b"]} for number in range(1_000)]}
    assert jsontext.IN_THREAD / 2 < len(jsontext.data_text(data)) < jsontext.IN_THREAD
    samples: tuple[dict[str, object], ...] = ({}, {"n": [1]}, data)
    for each in samples:
        assert jsontext.state_file(jsontext.data_text(each)) == json.dumps(each, ensure_ascii=False, indent=2).encode()


def test_a_long_state_file_is_as_it_is_stored() -> None:
    stored = jsontext.data_text({"n": list(range(100_000)), "name": "Ä"})
    is_as_stored = jsontext.state_file(stored) == stored.encode()
    assert is_as_stored


async def test_long_json_waits_for_no_other_work_and_none_for_it() -> None:
    """What watches the memory of runs uses the event loop's own threads."""
    released = threading.Event()
    with ThreadPoolExecutor(1) as others:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(others)
        busy = loop.run_in_executor(None, released.wait)
        try:
            long = list(range(60_000))
            text = json.dumps(long, separators=(",", ":"))
            assert await jsontext.loads_aside(text.encode()) == long
            assert await jsontext.read_state(f'{{"a":{text}}}'.encode()) == f'{{"a":{text}}}'
        finally:
            released.set()
            await busy
