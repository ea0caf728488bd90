"""What a supervisor sees of where it is."""

from __future__ import annotations

import os

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from typing import Any


def isolation_seen() -> dict[str, Any]:
    """What the kernel says of this process: namespaces by their inode, and the lines that tell of privileges."""
    wanted = ("Cap", "NoNewPrivs", "Seccomp")
    with open("/proc/self/status") as status:
        lines = dict(line.rstrip().split(":\t", 1) for line in status if line.startswith(wanted))
    return {"namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")}, **lines}
