"""JSON of very many values is refused before it is parsed: they would hold up others, and fill the memory."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest

from era.core import jsontext

_BYTES = 16 << 20
MANY = {
    "numbers": b"[" + b"1," * (_BYTES // 2) + b"1]",
    "lists": b"[" + b"[]," * (_BYTES // 3) + b"1]",
    "strings": b"[" + b'"",' * (_BYTES // 3) + b"1]",
    "keys": b"{" + b'"a":1,' * (_BYTES // 6) + b'"a":1}',
}


@pytest.mark.parametrize("kind", MANY)
@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
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
