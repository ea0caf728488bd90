"""The isolation that the supervisor sees of itself, for the sandbox's `enforced`."""

from __future__ import annotations

import os

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from typing import Any


def isolation_seen() -> dict[str, Any]:
    """`namespaces` of this process, as /proc/self/ns names them, and the lines of /proc/self/status about
    privileges."""
    about_privileges = ("Cap", "NoNewPrivs", "Seccomp")
    with open("/proc/self/status") as status:
        lines = dict(line.rstrip().split(":\t", 1) for line in status if line.startswith(about_privileges))
    return {"namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")}, **lines}
