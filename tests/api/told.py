"""Programs that go on when their test says so, however slow the machine is."""

from __future__ import annotations

import time

import httpx

from tests.conftest import eventually

UNTIL_TOLD = """
import era_storage, time
def until_told(word):
    while era_storage.kv.get('tests', 'said') != word: time.sleep(0.02)
"""
"""Python that defines `until_told(word)`."""

WAITS = f"{UNTIL_TOLD}until_told('go')\n"
"""A program that does nothing else."""

TELLS_ITS_END = """
import signal, time
import era_storage

told = []
signal.signal(signal.SIGTERM, lambda *_: told.append('told'))
for beat in range(2800):
    era_storage.kv.set('ends', 'one', told[0] if told else str(beat))
    if told: break
    if beat == 0: print('on', flush=True)
    time.sleep(0.1)
"""
"""A program that says `on`, goes on for minutes, and ends when it is told to: see `has_ended`."""

_SILENT = 10.0


def has_ended(client: httpx.Client) -> bool:
    """Whether the program TELLS_ITS_END ends, which is waited for. It says so, but on a busy machine the two seconds
    that it has for that may be too short: then one sees it by that it says nothing any more."""
    last, since = "", time.monotonic()

    def is_told_or_silent() -> bool:
        nonlocal last, since
        beat = client.get("/api/storage/kv/ends/one").json()["value"]
        if beat != last:
            last, since = beat, time.monotonic()
        return beat == "told" or time.monotonic() > since + _SILENT

    return bool(eventually(is_told_or_silent))


def tell(client: httpx.Client, word: str = "go") -> None:
    """Let the programs go on that wait for this word."""
    assert client.put("/api/storage/kv/tests/said", json={"value": word}).status_code == 200
