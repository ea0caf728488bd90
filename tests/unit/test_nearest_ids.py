"""The id that was probably meant by one that there isn't: looked for beside the event loop, and among short ones."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import pytest

from era.api import http
from era.common.spelling import nearest


async def test_it_is_looked_for_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def noted(name: str, known: Iterable[str], cutoff: float) -> str | None:
        threads.append(threading.current_thread())
        return nearest(name, known, cutoff)

    monkeypatch.setattr(http, "nearest", noted)
    assert await http._nearest_id("own", "my-proyect", ["other", "my-project"]) == "my-project"
    assert threads != [threading.current_thread()]
    assert len(threads) == 1


async def test_long_ids_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """To compare one of 128 characters with 200 such took most of a second."""
    compared: list[str] = []

    def noted(name: str, known: Iterable[str], cutoff: float) -> str | None:
        compared.extend(known)
        return None

    monkeypatch.setattr(http, "nearest", noted)
    await http._nearest_id("own", "a" * 40, ["b" * 40, "c" * 41, "d" * 128])
    assert compared == ["b" * 40]
    await http._nearest_id("own", "a" * 41, ["b" * 40])
    assert compared == ["b" * 40]
