"""`era serve` whose clock is off by what a file says: by so many seconds, as a C double, now and whenever that changes.

Linux can't give a process a time of day of its own: namespaces of time have the other clocks only. To set this
machine's would be wrong for all that runs on it. So it is shifted where Python reads it, before anything else has been
imported. Whatever the server stores, compares and says about the time of day it has from there.
"""

from __future__ import annotations

import mmap
import struct
import sys
import time
from collections.abc import Callable
from functools import wraps


def _shifted[T: (int, float)](clock: Callable[[], T], unit: T, ahead: mmap.mmap) -> Callable[[], T]:
    @wraps(clock)
    def read() -> T:
        (seconds,) = struct.unpack_from("d", ahead)
        return clock() + type(unit)(seconds * unit)

    return read


if __name__ == "__main__":
    with open(sys.argv.pop(1), "rb") as file:
        shown = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    time.time = _shifted(time.time, 1.0, shown)
    time.time_ns = _shifted(time.time_ns, 10**9, shown)

    from era.client import cli

    cli.main()
