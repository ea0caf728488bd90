"""The session's state, in two lines:

    with era_state.state() as data:
        data["n"] = data.get("n", 0) + 1

What `data` is at the end of the block is in `.session_data.json` then: all of it, or nothing where the block raises.
Other processes and threads of the run that use this wait for each other. A file of your own called era_state.py is
imported instead of this one.
"""

from __future__ import annotations

import _thread
import fcntl
import json
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["load", "save", "state"]

# Where the file is, whatever directory the program has gone to. Outside of a session: here.
_PLACE = "/workspace" if os.environ.get("ERA_SESSION") == "true" else os.getcwd()
FILE = os.path.join(_PLACE, ".session_data.json")

_inside: set[int] = set()  # threads within a block


class state:  # noqa: N801  reads as a function
    """`with state() as data:` gives the session's data as a dict, and keeps it when the block ends without an error."""

    def __enter__(self) -> dict[str, Any]:
        if _thread.get_ident() in _inside:
            raise RuntimeError("a block of state() can't be within another: the inner one's changes would be lost")
        self._pid = os.getpid()
        self._directory = os.open(_PLACE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._directory, fcntl.LOCK_EX)  # of the directory, since the file is replaced
            self._data = load()
        except BaseException:
            self._unlock()
            raise
        _inside.add(_thread.get_ident())
        return self._data

    def __exit__(self, kind: object, *_: object) -> None:
        _inside.discard(_thread.get_ident())
        try:
            if kind is None:
                save(self._data)
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if os.getpid() == self._pid:
            fcntl.flock(self._directory, fcntl.LOCK_UN)  # what was forked meanwhile has the lock, too
        os.close(self._directory)


def load() -> dict[str, Any]:
    """The session's data; empty where there is none. Raises ValueError if the file is no JSON object."""
    try:
        with open(FILE, encoding="utf-8") as file:
            data = json.load(file)
    except FileNotFoundError:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"{FILE} is not a JSON object")
    return data


def save(data: dict[str, Any]) -> None:
    """Put other data in its place: all of it, or nothing. Raises TypeError or ValueError for what is no JSON."""
    if not isinstance(data, dict):
        raise TypeError(f"a session's data is a dict, not {type(data).__name__}")
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, indent=2)
    new = f"{FILE}.{os.getpid()}-{_thread.get_ident()}"
    try:
        with open(new, "x", encoding="utf-8") as file:
            file.write(text)
        os.replace(new, FILE)
    except BaseException:
        try:
            os.unlink(new)
        except OSError:
            pass
        raise
