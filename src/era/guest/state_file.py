"""Writes and reads the state file of a live session for the service, from inside.

The service never walks a path that a program can have made. Between runs the supervisor of runs does this for it
(supervisor.py); beside processes this one does, as a process of the session like any other (`module` of
core/process.py's ProcessSpec). It can be killed by them, and then it is started anew.

Wire format. Each request is a kind (1 byte), the length of what follows (4 bytes, big endian), and that. So is each
answer.

  service to guest:  W  the state file's new content
                     R  the most bytes that it may have (text)
  guest to service:  K  it has been written
                     F  why it couldn't be written
                     S  its content     M  there is none     P  why it can't be read
"""

from __future__ import annotations

import os

from workspace import STATE_FILE, read_exactly, read_state, write_all, write_file

_HEAD = 5


def serve(fd: int) -> None:
    """Answer requests until the service has gone."""
    workspace = os.getcwd()
    while True:
        head = _read(fd, _HEAD)
        payload = _read(fd, int.from_bytes(head[1:], "big"))
        if head[:1] == b"W":
            try:
                os.chmod(workspace, 0o755)  # by its path: "." can't be found once a program has closed it to itself
                write_file(STATE_FILE, payload)
                _answer(fd, b"K", b"")
            except OSError as problem:
                _answer(fd, b"F", str(problem.strerror).encode())
        elif head[:1] == b"R":
            content, problem_text = read_state(int(payload))
            if problem_text is not None:
                _answer(fd, b"P", problem_text.encode())
            elif content is None:
                _answer(fd, b"M", b"")
            else:
                _answer(fd, b"S", content)


def _read(fd: int, size: int) -> bytes:
    content: bytes | None = read_exactly(fd, size)
    if content is None:
        raise SystemExit
    return content


def _answer(fd: int, kind: bytes, payload: bytes) -> None:
    write_all(fd, kind + len(payload).to_bytes(4, "big") + payload)
