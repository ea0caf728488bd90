"""A plain WebSocket client."""

from __future__ import annotations

import base64
import hashlib
import secrets
import socket
import struct

from tests.conftest import Server


class WebSocket:
    """A WebSocket connection that has sent its handshake. `head` is the server's answer to it, as text."""

    def __init__(self, server: Server, path: str, *headers: str, host: str | None = None) -> None:
        name, _, port = server.url.removeprefix("http://").rpartition(":")
        self.socket = socket.create_connection((name, int(port)), timeout=60)
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        lines = [
            f"GET {path} HTTP/1.1",
            f"Host: {host or f'{name}:{port}'}",
            "Upgrade: websocket",
            "Connection: keep-alive, Upgrade",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {key}",
            *headers,
        ]
        self._seen = b""
        try:
            self.socket.sendall("\r\n".join([*lines, "", ""]).encode())
            self.head = self._until(b"\r\n\r\n").decode("latin-1")
        except BaseException:
            self.socket.close()
            raise
        digest = hashlib.sha1(key.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        self.accepted = f"Sec-WebSocket-Accept: {base64.b64encode(digest).decode()}".lower() in self.head.lower()

    def send(self, payload: bytes, opcode: int = 2) -> None:
        """Send one masked frame."""
        size = len(payload)
        if size < 126:
            length = bytes([size | 128])
        else:
            length = b"\xff" + struct.pack("!Q", size) if size > 0xFFFF else b"\xfe" + struct.pack("!H", size)
        mask = secrets.token_bytes(4)
        keys = (mask * (size // 4 + 1))[:size]
        masked = (int.from_bytes(payload, "big") ^ int.from_bytes(keys, "big")).to_bytes(size, "big")
        self.socket.sendall(bytes([128 | opcode]) + length + mask + masked)

    def receive(self) -> tuple[int, bytes]:
        """The next frame: its opcode and payload."""
        first, size = self._take(2)
        if size == 126:
            (size,) = struct.unpack("!H", self._take(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", self._take(8))
        return first & 15, self._take(size)

    def rest(self) -> bytes:
        """All that comes until the server hangs up."""
        while piece := self.socket.recv(1 << 16):
            self._seen += piece
        return self._seen

    def refused(self) -> bytes:
        """The body of an answer that is no acceptance."""
        return self._take(int(self.head.lower().partition("content-length:")[2].split()[0]))

    def close(self) -> None:
        self.socket.close()

    def _take(self, size: int) -> bytes:
        while len(self._seen) < size:
            self._more()
        taken, self._seen = self._seen[:size], self._seen[size:]
        return taken

    def _until(self, end: bytes) -> bytes:
        while end not in self._seen:
            self._more()
        found, _, self._seen = self._seen.partition(end)
        return found + end

    def _more(self) -> None:
        piece = self.socket.recv(1 << 20)
        if not piece:
            raise ConnectionError(f"hung up after {self._seen[:200]!r}")
        self._seen += piece
