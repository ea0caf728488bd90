"""Frames of a WebSocket, at the server's end (RFC 6455): parsed, followed and made, without any input or output.

There are no extensions and no subprotocols. What breaks the rules raises BadFrame, whose code the connection is closed
with.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
NORMAL, PROTOCOL_ERROR, NOT_TEXT, TOO_BIG, RESTART = 1000, 1002, 1007, 1009, 1012

_FINAL, _RESERVED, _OPCODE = 0x80, 0x70, 0x0F
_MASKED, _LENGTH = 0x80, 0x7F
_MAX_CONTROL = 125


class BadFrame(Exception):
    """The client doesn't keep to the rules."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True, slots=True)
class Frame:
    """A whole message, or a control frame."""

    opcode: int
    data: bytes


class FrameFollower:
    """Tells where frames end in bytes that pass by, masked or not. It keeps no more of them than a frame's head."""

    def __init__(self) -> None:
        self._head = b""
        """The beginning of a head that hasn't come as a whole."""

        self._left = 0
        """Bytes that are still to come of a frame whose head has passed."""

        self.has_closed = False
        """Whether a Close frame has passed, or has begun to."""

    @property
    def is_between(self) -> bool:
        """Whether what passes next is the beginning of a frame."""
        return not self._left and not self._head

    def left_of_frame(self, data: bytes) -> int:
        """How many of the next bytes belong to the frame under way; 0 where they begin another one."""
        if not self._head:
            return min(self._left, len(data))
        whole = self._head + data
        if (found := _payload(whole, 0)) is None:
            return len(data)
        start, size = found
        return min(start + size + (4 if whole[1] & _MASKED else 0) - len(self._head), len(data))

    def follow(self, data: bytes) -> int:
        """Take the next bytes that pass; how many frames began in them."""
        data, at, count = self._head + data, self._left, 0
        while at < len(data) and (found := _payload(data, at)) is not None:
            self.has_closed = self.has_closed or data[at] & _OPCODE == CLOSE
            start, size = found
            at = start + size + (4 if data[at + 1] & _MASKED else 0)
            count += 1
        self._head, self._left = data[at:], max(at - len(data), 0)
        return count


class FrameReader:
    """Makes messages of the bytes that a client sends."""

    def __init__(self, max_bytes: int) -> None:
        """No message may be longer than `max_bytes`."""
        self._max_bytes = max_bytes
        self._unread = bytearray()
        self._opcode: int | None = None
        """That of the message whose frames are coming."""

        self._message = bytearray()

    @property
    def unread(self) -> bytes:
        """What hasn't become a frame."""
        return bytes(self._unread)

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take bytes; what has become whole with them. Raises BadFrame."""
        self._unread += data
        while (parsed := self._parsed()) is not None:
            is_final, opcode, payload = parsed
            if opcode >= CLOSE:
                yield Frame(opcode, payload)
                continue
            if (opcode == CONTINUATION) != (self._opcode is not None):
                raise BadFrame(PROTOCOL_ERROR)
            self._opcode = self._opcode or opcode
            self._message += payload
            if is_final:
                whole, kind = bytes(self._message), self._opcode
                self._message.clear()
                self._opcode = None
                if kind == TEXT and not _is_text(whole):
                    raise BadFrame(NOT_TEXT)
                yield Frame(kind, whole)

    def _parsed(self) -> tuple[bool, int, bytes] | None:
        """Take the next frame off what is unread: whether it is a message's last, its opcode, and its payload. None
        where it hasn't come as a whole. Raises BadFrame."""
        unread = self._unread
        if len(unread) < 2:
            return None
        first, second = unread[0], unread[1]
        opcode = first & _OPCODE
        is_control = opcode >= CLOSE
        if first & _RESERVED or not second & _MASKED or opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
            raise BadFrame(PROTOCOL_ERROR)
        if is_control and (second & _LENGTH > _MAX_CONTROL or not first & _FINAL):
            raise BadFrame(PROTOCOL_ERROR)
        if (found := _payload(unread, 0)) is None:
            return None
        start, size = found
        if not is_control and len(self._message) + size > self._max_bytes:
            raise BadFrame(TOO_BIG)
        end = start + 4 + size
        if len(unread) < end:
            return None
        payload = _unmasked(bytes(unread[start + 4 : end]), bytes(unread[start : start + 4]))
        del unread[:end]
        return bool(first & _FINAL), opcode, payload


def _payload(data: bytes | bytearray, at: int) -> tuple[int, int] | None:
    """Where the mask, or else the payload, of the frame begins whose head is at `at`, and the payload's size. None
    where the head hasn't come as a whole."""
    if len(data) < at + 2:
        return None
    size, start = data[at + 1] & _LENGTH, at + 2
    if size > _MAX_CONTROL:
        kind, width = ("!H", 2) if size == _MAX_CONTROL + 1 else ("!Q", 8)
        if len(data) < start + width:
            return None
        (size,) = struct.unpack_from(kind, data, start)
        start += width
    return start, size


def made(opcode: int, data: bytes) -> bytes:
    """A frame with a whole message."""
    if len(data) <= _MAX_CONTROL:
        head = struct.pack("!BB", _FINAL | opcode, len(data))
    elif len(data) < 1 << 16:
        head = struct.pack("!BBH", _FINAL | opcode, 126, len(data))
    else:
        head = struct.pack("!BBQ", _FINAL | opcode, 127, len(data))
    return head + data


def closing(code: int) -> bytes:
    """The frame that closes a connection with this code."""
    return made(CLOSE, struct.pack("!H", code))


def _unmasked(data: bytes, mask: bytes) -> bytes:
    key = (mask * (len(data) // 4 + 1))[: len(data)]
    return (int.from_bytes(data, "big") ^ int.from_bytes(key, "big")).to_bytes(len(data), "big")


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
