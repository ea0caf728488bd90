"""Redaction of answers: the values of secrets are replaced by their placeholders again.

Servers repeat what they were sent: in the `Location` of a redirect, on an error page, in a list of one's own settings.
A value is looked for as it is, in UTF-8, UTF-16 and UTF-32, and as URLs, JSON, HTML and base64 write it. What a server
has made of it besides, such as a hash or its two halves, isn't found.

A run may have thousands of such forms, tens of KiB long, and whoever answers decides what they are looked for in. So
all of it can be done in steps, between which others have their turn.

A stream comes in pieces, which may end within a value, so what is behind a piece's last line break is held back until
more has come. How much that is depends on sizes and line breaks alone. Were it what a value could begin with, a program
that has a server say what it likes would see, in how much comes at once, whether that is the beginning of a value: it
would learn one byte after the other, from a server that never says any.

Short values aren't looked for. They are in many answers by chance, and replacing them there would tell which they are.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heapreplace
from typing import Any
from urllib.parse import quote, quote_plus

from era.core.concurrency.frames import FrameFollower
from era.core.secrets import Secret
from era.network.http1 import Fields

MIN_VALUE_BYTES = 6
"""Of a value that is looked for."""

_WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
"""Encodings in which no text is what it is in UTF-8. Some servers write whichever the request accepts."""

_MIN_BASE64 = 6
_PIECE = 64 << 10

_FINDS = 64
"""How often a value is looked for in a step: each time takes up to 60 microseconds."""

_FOLLOWED = 4 << 10
"""Bytes of a WebSocket whose frames are followed in a step."""

type Steps[T] = Generator[None, None, T]
"""Work in steps of about a millisecond, which ends in a value."""

_URL_SAFE = ("", "/", "-_.!~*'()", ":/?#[]@!$&'()*+,;=-_.~", "*-._")
"""Characters that URLs' writers leave as they are: Python's, for paths, encodeURIComponent, encodeURI, and forms (of
URLSearchParams, Java, PHP), which write `~` in hexadecimal."""

_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MORE_HTML: tuple[dict[str, str], ...] = (
    {},  # text
    {'"': "&quot;", "'": "&#x27;"},  # Python, Django
    {'"': "&quot;", "'": "&#39;"},  # Ruby, Java, lodash
    {'"': "&#34;", "'": "&#39;"},  # Jinja, Go
)
"""What writers of HTML escape besides `_HTML`."""

_RARE_HTML: tuple[dict[str, str], ...] = (
    {'"': "&quot;"},  # attributes
    {'"': "&quot;", "'": "&#039;"},  # PHP
    {'"': "&quot;", "'": "&apos;"},  # XML
    {'"': "&#34;", "'": "&#39;", "+": "&#43;"},  # Go's templates
    {'"': "&quot;", "'": "&#x27;", "`": "&#x60;"},  # Underscore
    {'"': "&quot;", "'": "&#x27;", "`": "&#x60;", "=": "&#x3D;"},  # Handlebars
    {'"': "&quot;", "'": "&#39;", "/": "&#x2F;", "`": "&#x60;", "=": "&#x3D;"},  # Mustache
    {'"': "&quot;", "'": "&#x27;", "`": "&#x60;", "+": "&#x2B;"},  # .NET
)

_JSON_ESCAPED = ("", "<>&", "<>&'+")
"""Characters that writers of JSON write in hexadecimal besides: none, Go, for scripts."""

_RARE_JSON_ESCAPED = ("<>&'\"", "<>&'=", "<>&'+\"`")
"""PHP where it is asked to, Gson, .NET."""

_SHORT = 1 << 10
"""Bytes of a value that is looked for as rare writers write it, too. Keys and passwords are shorter, and so many forms
of longer values would take a run hundreds of MiB."""


class Redaction:
    """Replaces the values of these secrets."""

    def __init__(self, secrets: Sequence[Secret], marks: Mapping[bytes, bytes] | None = None) -> None:
        """`marks` is what is replaced besides, and by what. It may take seconds, for as many and as long secrets as a
        run may have."""
        marks = dict(marks or {})
        for secret in secrets:
            # Blanks at the ends of a header's value are no part of it, and servers trim what they are given.
            for value in dict.fromkeys((secret.value, secret.value.strip())):
                forms = _forms(value)
                for form in forms:
                    marks.setdefault(form, secret.placeholder.encode())
                for codec in _WIDE if forms else ():
                    marks.setdefault(value.encode(codec), secret.placeholder.encode(codec))
        self.marks = dict(sorted(marks.items(), key=lambda pair: len(pair[0])))
        """What is replaced, by what. The shortest comes first."""

        longest = len(next(reversed(self.marks), b""))
        # Rounded: the length of the longest form would tell how many of a value's characters are escaped.
        self.reach = (1 << max(longest - 1, 0).bit_length()) - 1
        """Bytes of a stream that are held back at least, where no line ends in them."""

        # To look for what is long costs as much for a few bytes as for many.
        self._least = self.reach - self.reach % _SHORT
        """Bytes that are passed on at least, where no line ends in them."""

        self._in_lines = not any(b"\n" in mark for mark in self.marks)
        """Whether a line break is in no value: it is in UTF-16 and UTF-32 of a few letters, such as U+010A."""

    def __bool__(self) -> bool:
        """Whether there is anything to look for."""
        return bool(self.marks)

    def whole(self, data: bytes) -> bytes:
        """The same without the values."""
        return done(self.of_whole(data))

    def of_whole(self, data: bytes) -> Steps[bytes]:
        """The same as `whole`, in steps."""
        return self.stream().steps(data, last=True)

    def of_fields(self, headers: Fields, left_alone: Collection[bytes] = ()) -> Steps[Fields]:
        """The same of headers and their names, in steps; not of those that are `left_alone`, in lower case."""
        redacted: Fields = []
        for name, value in headers:
            if name.lower() in left_alone:
                redacted.append((name, value))
            else:
                redacted.append(((yield from self.of_whole(name)), (yield from self.of_whole(value))))
        return redacted

    def settled(self, data: bytes) -> int:
        """How many of these bytes of a stream can't be in a value of which more is to come, whatever it is: those up to
        the last line break, and all but as many as a value may have."""
        first = len(data) - self.reach
        first = first if first >= self._least else 0
        return max(data.rfind(b"\n", first) + 1, first) if self._in_lines else first

    def stream(self) -> RedactedStream:
        return RedactedStream(self)

    def tripwire(self) -> Tripwire:
        return Tripwire(self)


def merged(parts: Sequence[Redaction]) -> Redaction:
    """Replaces what any of these does. Where two have other placeholders for one value, those of the first are
    taken."""
    marks: dict[bytes, bytes] = {}
    for part in reversed(parts):
        marks.update(part.marks)
    return Redaction([], marks)


class RedactedStream:
    """The same for a stream that comes in pieces. What is behind the last line break is held back until more has come,
    at most a few times what a value may have."""

    def __init__(self, redaction: Redaction) -> None:
        self._redaction, self._held = redaction, b""

    def look_for(self, redaction: Redaction) -> None:
        """Replace what this one does from now on."""
        self._redaction = redaction

    def feed(self, data: bytes, *, last: bool = False) -> bytes:
        """What may be passed on now. `last`: nothing follows."""
        return done(self.steps(data, last=last))

    def steps(self, data: bytes, *, last: bool = False) -> Steps[bytes]:
        """The same as `feed`, in steps."""
        marks, data, parts, at = self._redaction.marks, self._held + data, [], 0
        end = len(data) if last else self._redaction.settled(data)
        found = yield from _found(marks, data, end)
        finds = 0
        while found:
            finds += 1
            if finds % _FINDS == 0:
                yield
            start, _, mark = found[0]
            if start >= at:
                parts += [data[at:start], marks[mark]]
                at = start + len(mark)
            if (again := data.find(mark, at, end + len(mark) - 1)) >= 0:
                heapreplace(found, (again, -len(mark), mark))
            else:
                heappop(found)
        yield
        end = max(end, at)
        self._held = data[end:]
        return b"".join([*parts, data[at:end]])


class Tripwire:
    """Notices a value in what comes over a WebSocket, in which nothing can be replaced, as it says lengths. Frames that
    have come as a whole are passed on at once; of one that hasn't, as much as of any stream."""

    def __init__(self, redaction: Redaction) -> None:
        self._redaction = redaction
        self._frames = FrameFollower()
        self._passed, self._held = b"", b""
        """The last bytes that were passed on, with which a value may begin, and those that are held back."""

    def look_for(self, redaction: Redaction) -> None:
        """Notice the values that this one replaces from now on."""
        self._redaction = redaction

    def feed(self, data: bytes, *, last: bool = False) -> bytes | None:
        """What may be passed on now; None where a value has come. `last`: nothing follows."""
        return done(self.steps(data, last=last))

    def steps(self, data: bytes, *, last: bool = False) -> Steps[bytes | None]:
        """The same as `feed`, in steps."""
        yield from self._follow(data)
        data = self._held + data
        end = len(data) if last else max(self._redaction.settled(data), len(data) - self._frames.under_way)
        if not end:
            self._held = data
            return b""
        seen = self._passed + data
        if (yield from _found(self._redaction.marks, seen, len(seen))):
            return None
        behind = len(seen) - len(data) + end
        self._passed, self._held = seen[max(behind - self._redaction.reach, 0) : behind], data[end:]
        return data[:end]

    def _follow(self, data: bytes) -> Steps[None]:
        for at in range(0, len(data), _FOLLOWED):
            self._frames.follow(data[at : at + _FOLLOWED])
            yield


def done[T](steps: Steps[T]) -> T:
    """What comes of these steps, taken at once."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            value: T = end.value
            return value


def _found(marks: Mapping[bytes, bytes], data: bytes, end: int) -> Steps[list[tuple[int, int, bytes]]]:
    """Where each value comes first that begins before `end`, in steps: a heap, of those at one place the longest
    first."""
    found = []
    for number, mark in enumerate(marks if end else ()):
        if len(mark) > len(data):
            break
        if (place := data.find(mark, 0, end + len(mark) - 1)) >= 0:
            found.append((place, -len(mark), mark))
        if number % _FINDS == _FINDS - 1:
            yield
    yield
    heapify(found)
    return found


def _forms(value: str) -> set[bytes]:
    """How a value may be written."""
    if len(value.encode()) < MIN_VALUE_BYTES:
        return set()
    is_short = len(value.encode()) <= _SHORT
    texts = _texts(value, rare=is_short)
    if is_short:
        # Many servers read headers as Latin-1 (which HTTP/1.1 said at first), and write in UTF-8 what they have read.
        texts |= _texts(value.encode().decode("latin-1"), rare=False)
    return {text.encode() for text in texts} | _latin_1(value) | set(_base64(value.encode()))


def _texts(value: str, *, rare: bool) -> set[str]:
    """A value as URLs, JSON and HTML write it; with `rare`, as few of their writers do, too."""
    more_html = _MORE_HTML + _RARE_HTML if rare else _MORE_HTML
    json_escaped = _JSON_ESCAPED + _RARE_JSON_ESCAPED if rare else _JSON_ESCAPED
    urls = {quote(value, safe=safe) for safe in _URL_SAFE} | {quote_plus(value), quote_plus(value, safe="*-._")}
    urls |= {url.replace("~", "%7E") for url in urls}
    urls |= {re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), url) for url in urls}
    pages = {_translated(value, {**_HTML, **more}) for more in more_html}
    jsons = {
        _translated(value, {**_json(value, ascii_only=ascii_only), **escaped, **slash})
        for ascii_only in (True, False)
        for escaped in ({char: f"\\u{ord(char):04x}" for char in chars} for chars in json_escaped)
        for slash in ({}, {"/": "\\/"})
    }
    jsons |= {re.sub(r"\\u[0-9a-f]{4}", lambda found: "\\u" + found[0][2:].upper(), text) for text in jsons}
    return {value} | urls | pages | jsons


def _translated(value: str, table: dict[str, str]) -> str:
    return value.translate({ord(char): written for char, written in table.items()})


def _json(value: str, *, ascii_only: bool) -> dict[str, str]:
    """How each character of a value is written in JSON."""
    return {char: json.dumps(char, ensure_ascii=ascii_only)[1:-1] for char in set(value)}


def _latin_1(value: str) -> set[bytes]:
    """The value in Latin-1, with `?` for what isn't in that. Nothing where little else is left: question marks are in
    many answers."""
    written, left = value.encode("latin-1", "replace"), value.encode("latin-1", "ignore")
    return {written} if len(left) == len(value) or len(left) >= MIN_VALUE_BYTES else set()


def _base64(value: bytes) -> Iterator[bytes]:
    """What is certain to be in the base64 of anything that contains this value."""
    for before, unsure in enumerate((0, 2, 3)):
        padded = bytes(before) + value
        for encoded in (base64.b64encode(padded), base64.urlsafe_b64encode(padded)):
            sure = encoded[unsure : len(padded) * 8 // 6]
            if len(sure) >= _MIN_BASE64:
                yield sure


class Inflate:
    """Decompresses a body in pieces, of whichever of these encodings its first bytes are."""

    ENCODINGS = (b"gzip", b"x-gzip", b"deflate")

    def __init__(self) -> None:
        self._first = b""
        self._stream: Any = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Pieces of the content. Raises zlib.error."""
        if self._stream is None:
            self._first += data
            if len(self._first) < 2:
                return
            data = self._first
            # Some servers mean this by `deflate`: without the header of zlib (RFC 1950).
            is_raw = data[:2] != b"\x1f\x8b" and (data[0] & 15 != 8 or int.from_bytes(data[:2]) % 31)
            self._stream = zlib.decompressobj(wbits=-15 if is_raw else 47)
        while data:
            if self._stream.eof:
                self._stream = zlib.decompressobj(wbits=47)  # the next member
            piece = self._stream.decompress(data, _PIECE)
            data = self._stream.unconsumed_tail or self._stream.unused_data
            if piece:
                yield piece
        while not self._stream.eof and (piece := self._stream.decompress(b"", _PIECE)):
            yield piece

    @property
    def complete(self) -> bool:
        return self._stream.eof if self._stream is not None else not self._first
