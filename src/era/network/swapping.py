"""Placeholders of secrets swapped for their values, in the parts of a request to one host.

In headers, also within `Authorization: Basic`; in the target, as URLs write it; in bodies of JSON, forms and text, as
those write it. Headers that tell where a request goes or where it ends are left alone.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from urllib.parse import quote

from era.core.secrets import PLACEHOLDER, Secret
from era.network.http1 import Fields, Refused

MAX_BODY = 1 << 20
"""Bytes of a body in which placeholders are looked for."""

_MAX_SWAPPED = 4 << 20
"""Bytes that anything may have with its values."""

_MAX_HEAD = 256 << 10
ROUTING = {b"host", b"content-length", b"transfer-encoding"}
"""Headers that tell where a request goes, and where it ends."""

_LEFT_ALONE = ROUTING | {b"connection", b"upgrade", b"expect", b"te", b"trailer"}

type Writing = Callable[[str], bytes]


class Swap:
    """The secrets for one host. `used` are the names of those that were swapped in."""

    def __init__(self, secrets: Sequence[Secret]) -> None:
        self._secrets = {one.placeholder.encode(): one for one in secrets}
        self.used: set[str] = set()

    def target(self, target: bytes) -> bytes:
        return self._into(target, lambda value: quote(value, safe="").encode(), _MAX_HEAD)

    def headers(self, headers: Fields) -> Fields:
        """Raises Refused where they become too large."""
        swapped = [
            (name, value if name.lower() in _LEFT_ALONE else self._header(name, value)) for name, value in headers
        ]
        if sum(len(name) + len(value) for name, value in swapped) > _MAX_HEAD:
            raise _too_large()
        return swapped

    def body(self, content_type: bytes, body: bytes) -> bytes:
        """A body of a kind that `writing` knows. Raises Refused where it becomes too large."""
        how = writing(content_type)
        return body if how is None else self._into(body, how, _MAX_SWAPPED)

    def _header(self, name: bytes, value: bytes) -> bytes:
        scheme, space, credentials = value.partition(b" ")
        if name.lower() == b"authorization" and scheme.lower() == b"basic":
            try:
                given = base64.b64decode(credentials.strip(), validate=True)
            except binascii.Error:
                return value
            swapped = self._into(given, str.encode, _MAX_HEAD)
            return value if swapped == given else scheme + space + base64.b64encode(swapped)
        return self._into(value, str.encode, _MAX_HEAD).strip(b" ")

    def _into(self, text: bytes, how: Writing, most: int) -> bytes:
        written = {place: how(one.value) for place, one in self._secrets.items() if place in text}
        if len(text) + sum(text.count(place) * len(value) for place, value in written.items()) > most:
            raise _too_large()
        self.used |= {self._secrets[place].name for place in written}
        return PLACEHOLDER.sub(lambda found: written.get(found[0], found[0]), text)


def writing(content_type: bytes) -> Writing | None:
    """How a value is written in a body of this type; None where none is swapped in."""
    kind = content_type.partition(b";")[0].strip().lower()
    if kind.endswith(b"json"):
        return lambda value: json.dumps(value)[1:-1].encode()
    if kind == b"application/x-www-form-urlencoded":
        return lambda value: quote(value, safe="").encode()
    return str.encode if kind.startswith(b"text/") else None


def _too_large() -> Refused:
    return Refused(413, "too_large", "with its secrets the request is too large")
