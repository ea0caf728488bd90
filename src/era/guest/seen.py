"""What a sandbox looks like from inside."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def isolation_seen() -> dict[str, Any]:
    """What the kernel says of this process: namespaces by their inode, and the lines that tell of privileges."""
    wanted = ("Cap", "NoNewPrivs", "Seccomp")
    with open("/proc/self/status") as status:
        lines = dict(line.rstrip().split(":\t", 1) for line in status if line.startswith(wanted))
    return {"namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")}, **lines}


def device_files() -> dict[str, tuple[int, int]]:
    """What /dev has: mode and device number by name."""
    with os.scandir("/dev") as entries:
        found = {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
    return {name: (stat.st_mode, stat.st_rdev) for name, stat in {".": os.stat("/dev"), **found}.items()}
