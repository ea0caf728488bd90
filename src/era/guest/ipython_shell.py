"""IPython's shell in a Python context: what a cell shows goes to the channel, what it prints to stdout and stderr.

Everything that a cell can do is IPython's own. What is changed is only where results, tracebacks and input go.
"""

from __future__ import annotations

import base64
import os
import signal
import sys
import threading
import traceback
import types
from json import dumps

from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from traitlets import Type
from traitlets.config import Config

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import FrameType
    from typing import Any

CUT = 64 << 10
"""Characters that are kept of a traceback, and of the text of a result that is too large."""

INSIST = 0.5  # seconds


class Results:
    """The results of one cell, sent as they come, as long as they are no larger than allowed."""

    def __init__(self, show: Callable[[bytes, bytes], None]) -> None:
        """`show` sends a frame of this kind with this JSON object."""
        self._show = show
        self._left = self.execution_count = 0
        self.truncated = False

    def begin(self, limit: int, execution_count: int) -> None:
        """A cell with this number begins, whose results may have so many bytes together."""
        self._left = limit
        self.execution_count = execution_count
        self.truncated = False

    def add(self, data: Mapping[str, Any], metadata: Mapping[str, Any] | None, **more: object) -> None:
        """Send one MIME bundle. Of one that is too large only the beginning of its text is sent."""
        content = _encoded(data, metadata, more)
        if len(content) > self._left:
            self.truncated = True
            content = _encoded({"text/plain": str(data.get("text/plain", ""))[:CUT]}, {}, more)
        if len(content) <= self._left:
            self._left -= len(content)
            self._show(b"P", content)

    def clear(self, *, wait: bool = False) -> None:
        """Take back what the cell has shown so far; with `wait` once it shows something new."""
        self._show(b"C", dumps({"wait": bool(wait)}).encode())


def _encoded(data: Mapping[str, Any], metadata: Mapping[str, Any] | None, more: Mapping[str, object]) -> bytes:
    bundle = {"data": data, "metadata": metadata or {}, **more}
    return dumps(bundle, default=_plain, skipkeys=True).encode()


def _plain(value: object) -> object:
    """What JSON has no form for: bytes as Base64, as in notebooks, everything else as its repr."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else repr(value)


class _Hook(DisplayHook):
    """Sends the value of a cell's last expression."""

    def write_output_prompt(self) -> None:
        pass

    def write_format_data(self, format_dict: dict[str, Any], md_dict: dict[str, Any] | None = None) -> None:
        shell: Any = self.shell
        shell.results.add(format_dict, md_dict, main=True, execution_count=shell.results.execution_count)


class _Publisher(DisplayPublisher):
    """Sends what `display` is given."""

    def publish(
        self,
        data: dict[str, Any],
        metadata: dict[str, Any] | None = None,
        source: object = None,
        *,
        transient: dict[str, Any] | None = None,
        update: bool = False,
        **_: object,
    ) -> None:
        display_id = (transient or {}).get("display_id")
        more = {} if display_id is None else {"display_id": display_id, "update": update}
        self.shell.results.add(data, metadata, main=False, **more)

    def clear_output(self, wait: bool = False) -> None:
        self.shell.results.clear(wait=wait)


class Shell(InteractiveShell):
    """The shell of one context."""

    displayhook_class = Type(_Hook)
    display_pub_class = Type(_Publisher)
    results: Results
    last_error: dict[str, str] | None = None
    """Of the cell under way."""

    system = InteractiveShell.system_raw  # as in a terminal: output comes as it is written

    wants_to_end = False
    """The program has called `exit` or `quit`."""

    insisting: threading.Timer | None = None
    """Of an interrupt that came before the cell's own code began."""

    def ask_exit(self) -> None:
        self.wants_to_end = True

    def note_interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGINT before the cell's own code: an exception might be raised where Python or IPython ignores it.
        What takes long there, such as a hook of the program's, is interrupted all the same, a little later."""
        if self.insisting is not None:
            raise KeyboardInterrupt
        self.insisting = threading.Timer(INSIST, os.kill, (os.getpid(), number))
        self.insisting.daemon = True
        self.insisting.start()

    def let_go(self) -> bool:
        """Forget an interrupt that came before the cell's own code; whether there was one."""
        early, self.insisting = self.insisting, None
        if early is not None:
            early.cancel()
        return early is not None

    async def run_code(self, *given: Any, **named: Any) -> Any:
        if signal.getsignal(signal.SIGINT) == self.note_interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self.let_go():
                raise KeyboardInterrupt
        return await super().run_code(*given, **named)  # type: ignore[no-untyped-call]  # IPython's own

    def enable_gui(self, gui: str | None = None) -> None:
        """Nothing is to be done for figures as results, and there are no windows."""

    def _showtraceback(self, etype: type[BaseException], evalue: BaseException | None, stb: list[str]) -> None:
        text = "\n".join(stb)
        self.note_error(etype, evalue, text)
        print(text, file=sys.stderr, flush=True)

    def note_error(self, etype: type[BaseException], evalue: BaseException | None, text: str = "") -> dict[str, str]:
        """Note the error that a cell ends with, unless another one follows. `text` is its traceback, if it has one."""
        try:
            value = str(evalue)
        except Exception:
            value = "<it can't be shown>"
        name = getattr(etype, "__name__", str(etype))
        self.last_error = {"name": name, "value": value[:CUT], "traceback": (text or f"{name}: {value}")[-CUT:]}
        return self.last_error

    def note_printed_error(self, problem: BaseException) -> None:
        """Note an error that IPython has printed by itself: of a group of exceptions that is Python's own traceback, of
        a wrong use of a magic it is a line."""
        is_a_line = isinstance(problem, UsageError)
        text = "" if is_a_line else "".join(traceback.format_exception(problem)).rstrip()
        self.note_error(type(problem), problem, text)


def make_shell(results: Results) -> Shell:
    """The shell, with a module `__main__` for its variables."""
    main = types.ModuleType("__main__", "A context.")
    config = Config()
    config.HistoryManager.enabled = False  # what is remembered is remembered in memory
    config.HistoryManager.hist_file = ":memory:"
    config.InteractiveShell.colors = "nocolor"
    config.InteractiveShell.separate_in = ""
    config.InteractiveShell.separate_out2 = ""
    shell = Shell.instance(config=config, user_module=main)
    shell.results = results
    sys.modules["__main__"] = main
    return shell
