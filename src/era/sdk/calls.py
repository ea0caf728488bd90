"""A request before it is sent, whatever sends it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from json import dumps
from typing import IO
from urllib.parse import urlencode, urlsplit

from era.sdk.errors import LocalError

_PIECE = 256 << 10

type Content = bytes | str | os.PathLike[str] | IO[bytes]
"""What can be sent as a file's content: bytes, text (as UTF-8), the path of a local file, or an open binary file, which
is read from where it is and stays open."""

type Archive = bytes | str | os.PathLike[str] | IO[bytes]
"""The content of an archive, of files or of a session: bytes, the path of a local file, or an open binary file."""

type Query = Mapping[str, str | int | bool | None]
type Advance = Callable[[int], object]
"""Is told how many bytes more have been sent or received."""


class Body:
    """A request's body that is sent in pieces, as they are read."""

    def __init__(self, file: IO[bytes], size: int | None, advance: Advance | None, *, own: bool = False) -> None:
        """`size` is in bytes, None where nobody knows it before. `close` closes the file only if it is its `own`."""
        self.size = size
        self._file = file
        self._own = own
        self._advance = advance
        self._start = file.tell() if file.seekable() else None
        self._begun = False
        self._read = self._told = 0

    def piece(self) -> bytes:
        """The next bytes, none at the end. Raises LocalError."""
        self._begun = True
        try:
            piece = self._file.read(_PIECE)
        except OSError as error:
            name = getattr(self._file, "name", "the file")
            raise LocalError(f"{_named(name)} can't be read: {error.strerror}") from None
        self._read += len(piece)
        if self._read > self._told:  # what is sent again was told before
            if self._advance is not None:
                self._advance(self._read - self._told)
            self._told = self._read
        return piece

    def pieces(self) -> Iterator[bytes]:
        while piece := self.piece():
            yield piece

    def rewind(self) -> bool:
        """Begin anew; false where something was read that can't be read again."""
        if self._begun:
            if self._start is None:
                return False
            self._file.seek(self._start)
            self._begun, self._read = False, 0
        return True

    def close(self) -> None:
        if self._own:
            self._file.close()


class Call:
    """One request: what is sent, how long the answer may take, and whether it is safe to send it twice."""

    __slots__ = ("body", "headers", "method", "path", "repeatable", "seconds", "target")

    def __init__(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        json: object = None,
        content: bytes | Body | None = None,
        kind: str = "application/octet-stream",
        once: bool | str = False,
        seconds: float | None = None,
    ) -> None:
        """Make a request.

        Args:
            method: The HTTP method.
            path: The path, quoted.
            query: Parameters of the query. Those that are None are left out.
            json: The body as JSON, in place of `content`.
            content: The body as bytes.
            kind: The type of `content`.
            once: Whether to send an Idempotency-Key, with which the server carries the request out once however often
                it is sent. A string is the key itself; True makes a random one.
            seconds: How long the answer may take; None: the client's timeout.

        Raises:
            LocalError: The key can't be a header.
        """
        self.method = method
        self.path = path
        given = {name: _text(value) for name, value in (query or {}).items() if value is not None}
        self.target = f"{path}?{urlencode(given)}" if given else path
        self.headers: dict[str, str] = {}
        self.body: bytes | Body | None = content
        self.seconds = seconds
        self.repeatable = once is not False or method in ("GET", "HEAD")
        if json is not None:
            self.body = _json(json)
            self.headers["Content-Type"] = "application/json"
        elif content is not None:
            self.headers["Content-Type"] = kind
        if once is not False:
            self.headers["Idempotency-Key"] = os.urandom(16).hex() if once is True else _key(once)

    def rewind(self) -> bool:
        """Get ready to be sent again; false where that can't be."""
        return not isinstance(self.body, Body) or self.body.rewind()

    def close(self) -> None:
        """It isn't sent any more."""
        if isinstance(self.body, Body):
            self.body.close()


def address(url: str) -> str:
    """A server's address without a slash at its end. Raises LocalError if it is none, or has a password."""
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isascii()
    except ValueError:
        fine = False
    if "@" in url.partition("//")[2].partition("/")[0]:  # first, as the message below would show it
        raise LocalError("An address has no user and no password. Say a key as Era(api_key=…), or in ERA_API_KEY.")
    if not fine or not url.isprintable() or " " in url:
        raise LocalError(f"{url[:200]!r} is no address of a server: it is like http://127.0.0.1:8787.")
    return url.rstrip("/")


def authorization(key: str | None) -> dict[str, str]:
    """The header that brings a key, none without one. Raises LocalError for what can't be in a header."""
    key = (key or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise LocalError("The API key has characters that no key has.")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _json(value: object) -> bytes:
    """JSON in UTF-8. Raises LocalError for text that is no Unicode, and ValueError or TypeError for what is no JSON."""
    try:
        return dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise LocalError("Some text has unpaired surrogates, as of a word that isn't UTF-8.") from None


def _key(key: str) -> str:
    """Return an idempotency key. Raises LocalError if it can't be a header."""
    if not (key.isascii() and key.isprintable() and key.strip()):
        raise LocalError("An idempotency key is printable ASCII, such as 'order-1042'.")
    return key


def content_of(content: Content, advance: Advance | None = None) -> bytes | Body:
    """A request's body. Raises LocalError if a file can't be opened."""
    if isinstance(content, str):
        return content.encode()
    if isinstance(content, bytes):
        return content
    if isinstance(content, os.PathLike):
        return _file(content, advance)
    return Body(content, None, advance)


def archive_of(archive: Archive, advance: Advance | None = None) -> bytes | Body:
    """The same for an archive, which is never text: a string is a path, as where one is written."""
    return _file(archive, advance) if isinstance(archive, str) else content_of(archive, advance)


def _file(path: str | os.PathLike[str], advance: Advance | None) -> Body:
    try:
        file = open(path, "rb")  # noqa: SIM115  the body closes it
    except OSError as error:
        raise LocalError(f"{path} can't be read: {error.strerror}") from None
    found = os.fstat(file.fileno())
    # Of a pipe, and of a file of /proc, it is 0 whatever they have.
    return Body(file, found.st_size or None if stat.S_ISREG(found.st_mode) else None, advance, own=True)


def _text(value: str | int | bool | None) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _named(name: object) -> str:
    return "standard input" if name == "<stdin>" else str(name)
