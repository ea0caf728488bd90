"""Found by Python itself while it starts `python3 main.py` as PID 1 of a sandbox. See supervisor.py."""

import sys

_loaded_at_start = frozenset(sys.modules)

import supervisor  # noqa: E402  what plain Python loads must be noted first

supervisor.serve(_loaded_at_start)
