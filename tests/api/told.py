"""Programs that go on when their test says so, however slow the machine is."""

from __future__ import annotations

import httpx

UNTIL_TOLD = """
import era_storage, time
def until_told(word):
    while era_storage.kv.get('tests', 'said') != word: time.sleep(0.02)
"""
"""Python that defines `until_told(word)`."""

WAITS = f"{UNTIL_TOLD}until_told('go')\n"
"""A program that does nothing else."""

TELLS_ITS_END = """
import os, signal, time
import era_storage

def end(*_):
    era_storage.kv.set('ends', 'one', 'told')
    os._exit(0)

signal.signal(signal.SIGTERM, end)
era_storage.kv.get('ends', 'one')  # so that all is loaded: two seconds are short on a busy machine
print('on', flush=True)
time.sleep(280)
"""
"""A program that says `on`, and when it is told to end notes that in the storage, as `one` of the namespace `ends`."""


def tell(client: httpx.Client, word: str = "go") -> None:
    """Let the programs go on that wait for this word."""
    assert client.put("/api/storage/kv/tests/said", json={"value": word}).status_code == 200
