"""What a supervisor does before its first run: it takes what it was started with, puts up its walls, loads modules."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import sys

import connect_filter
import container_split
import immortal_objects
import landlock
import socket_broker
import template
from processes import renew_streams, reset_signals

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from typing import Any

    from program_module import ProgramModule

PR_SET_DUMPABLE = 4

# What programs import most. Each costs memory in every spare, and time when it is finalized.
PRELOAD = ("collections", "datetime", "json", "math", "os.path", "random", "re", "string", "traceback")

_libc = ctypes.CDLL(None, use_errno=True)


def prepare() -> dict[str, Any]:
    """Read the configuration (ERA_GUEST, JSON; drivers/guest.py writes it), hand over sockets, put up the walls, and
    return the configuration, completed. In a template (template.py), and in gVisor (container_split.py), this returns
    in forks only."""
    config: dict[str, Any] = json.loads(os.environ.pop("ERA_GUEST"))
    preloaded = None
    gc.disable()
    if "template" in config:
        preloaded = preload(for_many=True)
        config = template.serve(config)
        if config["fork"]:
            look_for_packages(config["packages"], preloaded)
    if "division" in config:
        config = container_split.divide(config)
    control = config["control"]
    if control != 3:
        os.dup2(control, 3, inheritable=False)
        config["control"] = 3
    os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    # An empty stdin of the sandbox's own: the host's /dev/null could not be opened again, by its name /dev/stdin.
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.umask(0o022)
    reset_signals()
    config["broker"] = None  # in gVisor, gvisor.py has it and the connect filter
    if config["guest_listeners"] or config.get("has_broker"):
        can_supervise = connect_filter.is_available()
        config["broker"] = socket_broker.hand_over(3, config["guest_listeners"], can_supervise=can_supervise)
        config["supervised"] = config["supervised"] and can_supervise
    isolation = isolation_seen()  # before our own /proc is closed to us too
    config["isolation"] = {**isolation, "landlock": landlock.restrict(config["landlock"])}
    _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # /proc/1/{mem,environ,fd} are out of every program's reach
    config["program_module"] = (preloaded or preload()) if config["fork"] else None
    gc.freeze()
    return config


def preload(*, for_many: bool = False) -> ProgramModule:
    """Load what programs import most, and what watches over them. Say `for_many` where many sandboxes come from this
    process: they share more of its memory then, for 30 ms once."""
    renew_streams()
    for name in PRELOAD:
        __import__(name)
    import program_module

    watching = program_module.ProgramModule()
    gc.collect()
    if for_many:
        immortal_objects.make_lasting()
    gc.freeze()  # and nobody's collection writes to these objects, which all forks share
    return watching


def look_for_packages(place: str, watching: ProgramModule) -> None:
    """In a fork of a template, do what Python would have done at its start: have the session's packages on the path,
    where it has any. The template had an empty directory at this place."""
    sys.path_importer_cache.pop(place, None)
    if os.path.isdir(place):
        watching.look_for_packages()
    else:
        sys.path.remove(place)


def isolation_seen() -> dict[str, Any]:
    """`namespaces` of this process, as /proc/self/ns names them, and the lines of /proc/self/status about
    privileges."""
    about_privileges = ("Cap", "NoNewPrivs", "Seccomp")
    with open("/proc/self/status") as status:
        lines = dict(line.rstrip().split(":\t", 1) for line in status if line.startswith(about_privileges))
    return {"namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")}, **lines}
