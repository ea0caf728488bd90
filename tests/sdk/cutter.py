"""A way to a server that breaks: it passes bytes on, and cuts connections as it is told."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit

type Cut = Callable[[int, bytes], bool]


class Cutter:
    """Listens on a port of its own. `cut` is asked with a connection's number and all that came back on it so far: true
    cuts it there. A context manager."""

    def __init__(self, target: str, cut: Cut) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname, parts.port)
        self._cut = cut
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self.requests: list[bytes] = []
        self._open: list[socket.socket] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for each in self._open:
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                number, self.connections = self.connections, self.connections + 1
                far = socket.create_connection(self._target)
                self._open += [near, far]
                threading.Thread(target=self._there, args=(near, far), daemon=True).start()
                threading.Thread(target=self._back, args=(number, near, far), daemon=True).start()

    def _there(self, near: socket.socket, far: socket.socket) -> None:
        with suppress(OSError):
            while data := near.recv(1 << 16):
                self.requests.append(data)
                far.sendall(data)
            far.shutdown(socket.SHUT_WR)

    def _back(self, number: int, near: socket.socket, far: socket.socket) -> None:
        came = b""
        with suppress(OSError):
            while data := far.recv(1 << 16):
                came += data
                if self._cut(number, came):
                    break
                near.sendall(data)
        for each in (near, far):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def cut_once_after(text: bytes, and_then: int = 0) -> Cut:
    """Cut the first connection that brings this, and so many of the later ones before they bring anything."""
    done: list[int] = []

    def cut(number: int, came: bytes) -> bool:
        if (number <= done[0] or len(done) > and_then) if done else text not in came:
            return False
        done.append(number)
        return True

    return cut
