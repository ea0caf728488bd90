"""Starts the supervisor. Python imports this module by itself while it starts `python3 main.py` as PID 1 of a sandbox;
supervisor.py says why so."""

import sys

_loaded_at_start = frozenset(sys.modules)

import supervisor  # noqa: E402  what plain Python loads must be noted first

supervisor.serve(_loaded_at_start)
