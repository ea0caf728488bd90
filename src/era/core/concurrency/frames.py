"""Frames of a WebSocket (RFC 6455): followed, and at the server's end parsed and made, without any input or output.

There are no extensions and no subprotocols. What breaks the rules raises BadFrame, whose code the connection is closed
with.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
NORMAL, PROTOCOL_ERROR, NOT_TEXT, POLICY, TOO_BIG, RESTART = 1000, 1002, 1007, 1008, 1009, 1012

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
    """A whole message in text, a piece of one in binary, or a control frame."""

    opcode: int
    data: bytes


class FrameFollower:
    """Tells where frames end in bytes that pass by, masked or not. It keeps no more of them than a frame's head."""

    def __init__(self, left: int = 0) -> None:
        self._head = b""
        """The beginning of a head that hasn't come as a whole."""

        self._left = left
        """Bytes that are still to come of a frame whose head has passed."""

        self.under_way = 0
        """Bytes that have passed of a frame that hasn't as a whole."""

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
        began = len(self._head) - self.under_way
        data, at, count = self._head + data, self._left, 0
        while at < len(data) and (found := _payload(data, at)) is not None:
            self.has_closed = self.has_closed or data[at] & _OPCODE == CLOSE
            start, size = found
            began, at = at, start + size + (4 if data[at + 1] & _MASKED else 0)
            count += 1
        self.under_way = len(data) - (at if at <= len(data) else began)
        self._head, self._left = data[at:], max(at - len(data), 0)
        return count


class FrameReader:
    """Makes messages of the bytes that a client sends. Those in binary are given out in pieces, as they come: whoever
    opens thousands of connections shall not have a whole message of each kept."""

    def __init__(self, max_bytes: int, max_text: int) -> None:
        """No message may be longer than `max_bytes`, and none in text than `max_text`."""
        self._max_bytes = max_bytes
        self._max_text = max_text
        self._unread = bytearray()
        self._opcode: int | None = None
        """That of the message whose frames are coming."""

        self._size = 0
        """Of that message so far, with all of the frame under way."""

        self._text = bytearray()
        """What has come of it, where it is text."""

        self._left = 0
        """Bytes that are still to come of the frame under way."""

        self._mask = b""
        self._is_final = False
        """Whether that frame is its message's last."""

    def follower(self) -> FrameFollower:
        """One that goes on where this has got to. What it hasn't made a frame of has passed already."""
        follower = FrameFollower(self._left)
        follower.follow(bytes(self._unread))
        return follower

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take bytes; what has come with them. Raises BadFrame."""
        self._unread += data
        while True:
            if not self._left:
                if (head := self._head()) is None:
                    return
                opcode, start, size = head
                if opcode >= CLOSE:
                    if len(self._unread) < start + size:
                        return
                    payload = _unmasked(bytes(self._unread[start : start + size]), self._unread[start - 4 : start])
                    del self._unread[: start + size]
                    yield Frame(opcode, payload)
                    continue
                self._begin(start, size, opcode)
            elif not self._unread:
                return
            piece = bytes(self._unread[: self._left])
            del self._unread[: len(piece)]
            self._left -= len(piece)
            unmasked = _unmasked(piece, self._mask)
            turned = len(piece) % 4
            self._mask = self._mask[turned:] + self._mask[:turned]
            yield from self._taken(unmasked)

    def _head(self) -> tuple[int, int, int] | None:
        """Of the next frame: its opcode, where its payload begins, and how long that is. None where the head hasn't
        come as a whole. Raises BadFrame."""
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
        if not is_control:
            if (opcode == CONTINUATION) != (self._opcode is not None):
                raise BadFrame(PROTOCOL_ERROR)
            kind = opcode if self._opcode is None else self._opcode
            if self._size + size > (self._max_text if kind == TEXT else self._max_bytes):
                raise BadFrame(TOO_BIG)
        return None if len(unread) < start + 4 else (opcode, start + 4, size)

    def _begin(self, start: int, size: int, opcode: int) -> None:
        """Begin with a frame of a message, whose payload starts there."""
        self._is_final = bool(self._unread[0] & _FINAL)
        self._mask = bytes(self._unread[start - 4 : start])
        self._opcode = opcode if self._opcode is None else self._opcode
        self._size += size
        self._left = size
        del self._unread[:start]

    def _taken(self, data: bytes) -> Iterator[Frame]:
        """Take some of the frame under way. Raises BadFrame."""
        is_whole = self._is_final and not self._left
        kind, text = self._opcode, b""
        if kind == TEXT:
            self._text += data
        if is_whole:
            text = bytes(self._text)
            self._text.clear()
            self._opcode, self._size = None, 0
        if kind == BINARY and data:
            yield Frame(BINARY, data)
        elif kind == TEXT and is_whole:
            if not _is_text(text):
                raise BadFrame(NOT_TEXT)
            yield Frame(TEXT, text)


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


def _unmasked(data: bytes, mask: bytes | bytearray) -> bytes:
    key = (mask * (len(data) // 4 + 1))[: len(data)]
    return (int.from_bytes(data, "big") ^ int.from_bytes(key, "big")).to_bytes(len(data), "big")


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
