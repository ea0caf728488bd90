"""Which files are removed, and in which thread: a large one takes long, so it isn't done on the event loop."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest


def noted_removals(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, threading.Thread]]:
    """The names of files that exist and are removed from now on, each with the thread that does it."""
    noted: list[tuple[str, threading.Thread]] = []
    unlink = os.unlink

    def noting(path: Any, **options: Any) -> None:
        unlink(path, **options)
        noted.append((Path(path).name, threading.current_thread()))

    monkeypatch.setattr(os, "unlink", noting)
    return noted


def on_the_loop(noted: list[tuple[str, threading.Thread]]) -> list[str]:
    """Those that the event loop has removed, which is the main thread's in tests."""
    return [name for name, thread in noted if thread is threading.main_thread()]
