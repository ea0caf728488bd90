"""An interpreter of classic BPF: the verdict of a filter of system calls, worked out without a kernel."""

from __future__ import annotations

import struct
from collections.abc import Sequence

ALLOW = 0x7FFF0000
ERRNO = 0x00050000


def verdict(filters: Sequence[bytes], number: int, arguments: Sequence[int], architecture: int) -> int:
    """The errno that a call fails with, 0 if it is allowed. The filter that was loaded last runs first."""
    words = [argument & (1 << 64) - 1 for argument in [*arguments, *[0] * 6][:6]]
    data = struct.pack("<iIQ6Q", number if number < 1 << 31 else number - (1 << 32), architecture, 0, *words)
    for program in reversed(filters):
        answer = _run(program, data)
        if answer != ALLOW:
            assert answer & 0xFFFF0000 == ERRNO, hex(answer)
            return answer & 0xFFFF
    return 0


def _run(program: bytes, data: bytes) -> int:
    """Run a filter. Each instruction is a code, the jumps for a test that holds and one that doesn't, and a value."""
    instructions = list(struct.iter_unpack("<HBBI", program))
    at = accumulator = 0
    while True:
        code, if_true, if_false, value = instructions[at]
        at += 1
        match code:
            case 0x20:  # load a word
                accumulator = int.from_bytes(data[value : value + 4], "little")
            case 0x54:  # and
                accumulator &= value
            case 0x05:  # jump
                at += value
            case 0x15:
                at += if_true if accumulator == value else if_false
            case 0x25:
                at += if_true if accumulator > value else if_false
            case 0x35:
                at += if_true if accumulator >= value else if_false
            case 0x45:
                at += if_true if accumulator & value else if_false
            case 0x06:
                return int(value)
            case _:
                raise AssertionError(f"no such instruction: {code:#x}")
