"""Replacing the placeholders of secrets by their values, in requests to one host.

In headers, also within `Authorization: Basic`; in bodies of JSON, forms and text, escaped as in these. Headers that say
where a request goes or where it ends are left alone. So is the target: servers log it, pass it on in `Referer` and
repeat it in redirects.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections import Counter
from collections.abc import Callable, Sequence
from urllib.parse import quote

from era.core.secrets import PLACEHOLDER, Secret
from era.network.http1 import Fields, Refused

MAX_BODY = 1 << 20
"""Bytes of a body in which placeholders are looked for."""

_PLACEHOLDER_BYTES = 43

_MAX_SWAPPED_BODY, _MAX_SWAPPED_HEAD = 4 << 20, 256 << 10
"""Bytes that a body, and that all headers, may have with the values in them."""

ROUTING = {b"host", b"content-length", b"transfer-encoding"}
"""Headers that say where a request goes, and where it ends."""

_LEFT_ALONE = ROUTING | {b"connection", b"upgrade", b"expect", b"te", b"trailer"}

type Escape = Callable[[str], bytes]
"""Writes a value as some kind of text has it."""


class Swap:
    """Swaps in the secrets of one host. `used` has the names of those that were."""

    def __init__(self, secrets: Sequence[Secret]) -> None:
        self._secrets = {secret.placeholder.encode(): secret for secret in secrets}
        self.used: set[str] = set()

    def headers(self, headers: Fields) -> Fields:
        """A request's headers. Raises Refused where they become too large."""
        swapped = [
            (name, value if name.lower() in _LEFT_ALONE else self._header(name, value)) for name, value in headers
        ]
        if sum(len(name) + len(value) for name, value in swapped) > _MAX_SWAPPED_HEAD:
            raise _too_large()
        return swapped

    def body(self, content_type: bytes, body: bytes) -> bytes:
        """A request's body; as it is where `escape_for` knows no way. Raises Refused where it becomes too large."""
        escape = escape_for(content_type)
        return body if escape is None else self._swap(body, escape, _MAX_SWAPPED_BODY)

    def _header(self, name: bytes, value: bytes) -> bytes:
        scheme, space, credentials = value.partition(b" ")
        if name.lower() == b"authorization" and scheme.lower() == b"basic":
            try:
                given = base64.b64decode(credentials.strip(), validate=True)
            except binascii.Error:
                return value
            swapped = self._swap(given, str.encode, _MAX_SWAPPED_HEAD)
            return value if swapped == given else scheme + space + base64.b64encode(swapped)
        return self._swap(value, str.encode, _MAX_SWAPPED_HEAD).strip(b" ")

    def _swap(self, text: bytes, escape: Escape, limit: int) -> bytes:
        if len(text) < _PLACEHOLDER_BYTES:
            return text
        found = Counter(PLACEHOLDER.findall(text))
        values = {mark: escape(self._secrets[mark].value) for mark in found if mark in self._secrets}
        if len(text) + sum(found[mark] * len(value) for mark, value in values.items()) > limit:
            raise _too_large()
        self.used |= {self._secrets[mark].name for mark in values}
        return PLACEHOLDER.sub(lambda match: values.get(match[0], match[0]), text)


def escape_for(content_type: bytes) -> Escape | None:
    """How a value is written in a body of this type; None where none is swapped in."""
    kind = content_type.partition(b";")[0].strip().lower()
    if kind.endswith(b"json"):
        return lambda value: json.dumps(value)[1:-1].encode()
    if kind == b"application/x-www-form-urlencoded":
        return _url_escaped
    return str.encode if kind.startswith(b"text/") else None


def _url_escaped(value: str) -> bytes:
    return quote(value, safe="").encode()


def _too_large() -> Refused:
    return Refused(413, "too_large", "with its secrets the request is too large")
