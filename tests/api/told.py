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


def tell(client: httpx.Client, word: str = "go") -> None:
    """Let the programs go on that wait for this word."""
    assert client.put("/api/storage/kv/tests/said", json={"value": word}).status_code == 200
