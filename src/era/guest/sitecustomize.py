"""Starts the supervisor. Python imports this module by itself while it starts `python3 main.py` as PID 1 of a sandbox;
supervisor.py says why so."""

import os
import sys

_loaded_at_start = frozenset(sys.modules)

if "ERA_GUEST" in os.environ:  # not so in an interpreter that a program has made within its own process
    import supervisor

    supervisor.serve(_loaded_at_start)
