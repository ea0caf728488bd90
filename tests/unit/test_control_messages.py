"""What clients of terminals say that is far too long to be a control message."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from typing import Any, cast

import pytest

from era.api.routes import terminals
from era.errors import BadRequest

LONG = json.dumps({"nonsense": [1] * 300_000})


@pytest.mark.parametrize("is_sound", [True, False], ids=["", "weakened"])
async def test_a_long_message_is_not_parsed(is_sound: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_sound:
        monkeypatch.setattr(terminals, "_MAX_CONTROL", 1 << 30)
    inputs: asyncio.Queue[bytes | None] = asyncio.Queue()
    tracemalloc.start()
    try:
        with pytest.raises(BadRequest):
            await terminals._control(cast("Any", None), LONG, inputs)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (peak < 1 << 20) is is_sound
    assert inputs.empty()
