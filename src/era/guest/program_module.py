"""The module that a Python program is: tells when its code starts and when it has returned normally.

Theory of operation
===================

The interpreter itself opens, compiles and runs `main.py`, and asks us nothing. But it has events, those of
sys.monitoring: PY_START once, to get hold of the code before its first instruction, then PY_RETURN of this one code
object. Other code is as fast as without. The tool's number is given back at once, since callbacks stay without it;
where they wouldn't (3.14 and later), it is kept.

Only the process that was started as the program is told of: not one that it forked.
"""

from __future__ import annotations

import os
import sys

import early_exit
import last_value

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from types import CodeType

_TOOL = 4  # one of the numbers that Python's documents give to nobody
_BEFORE_3_14 = sys.version_info < (3, 14)


class ProgramModule:
    """Made before the process is forked that becomes the program."""

    def __init__(self) -> None:
        self._last_value = last_value.prepared()
        self._ending = early_exit.prepared()

    def look_for_packages(self) -> None:
        """Look anew whether there are packages whose values are kept."""
        self._last_value = last_value.prepared()

    def watch(self, path: str) -> None:
        """Follow the module that this process runs next: the program at `path`, which is absolute."""
        value, end = self._last_value, self._ending
        if value is None and end is None:
            return
        monitoring, events = sys.monitoring, sys.monitoring.events
        pid = os.getpid()

        def on_start(code: CodeType, _: int) -> None:
            if code.co_filename != path or code.co_name != "<module>":
                return
            monitoring.set_events(_TOOL, 0)
            monitoring.register_callback(_TOOL, events.PY_START, None)
            if (value is not None and value.change(code)) or end is not None:
                monitoring.register_callback(_TOOL, events.PY_RETURN, on_return)
                monitoring.set_local_events(_TOOL, code, events.PY_RETURN)
            if _BEFORE_3_14:
                monitoring.free_tool_id(_TOOL)

        def on_return(code: CodeType, offset: int, returned: object) -> None:
            if os.getpid() != pid:
                return
            if value is not None:
                last_value.keep(returned)
            if end is not None:
                end.module_returned()

        monitoring.use_tool_id(_TOOL, "era")
        monitoring.register_callback(_TOOL, events.PY_START, on_start)
        monitoring.set_events(_TOOL, events.PY_START)
        if end is not None:
            end.expect()
