"""Whether a delivery was sent by who knows the secret: signatures of its raw body, as senders of webhooks make them.

All are HMAC-SHA256, and differ in the header that holds it and in how it is written there. They are compared in
constant time.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

type Scheme = Literal["github", "stripe", "hmac"]

HEADERS: dict[Scheme, str] = {
    "github": "x-hub-signature-256",
    "stripe": "stripe-signature",
    "hmac": "x-signature",
}
"""Where a signature stands if the owner doesn't say."""

TOLERANCE = 300
"""Seconds that a signature with a time may be old, or ahead."""

_MAX_SIGNATURES = 16


@dataclass(frozen=True, slots=True)
class Verify:
    """How to tell genuine deliveries. `header` is in lower case."""

    scheme: Scheme
    secret: str = field(repr=False)
    header: str


def is_genuine(verify: Verify, headers: Sequence[tuple[bytes, bytes]], body: bytes, at: float) -> bool:
    """Whether the request is signed with the secret. `headers` are as they came, `at` is in seconds since 1970."""
    given = [value for name, value in headers if name.decode("latin-1").lower() == verify.header]
    if len(given) != 1:  # of several, others might take another one for the signature
        return False
    signature = given[0].strip()
    match verify.scheme:
        case "github":
            return _equal(b"sha256=" + _hex(verify, body), signature)
        case "stripe":
            return _is_stripes(verify, signature, body, at)
        case "hmac":
            signature = signature.removeprefix(b"sha256=")
            expected = _hex(verify, body)
            # Either is tried, so that the time it takes tells nothing of which one was nearly right.
            as_hex = _equal(expected, signature.lower())
            return _equal(base64.b64encode(bytes.fromhex(expected.decode())), signature) or as_hex


def _is_stripes(verify: Verify, signature: bytes, body: bytes, at: float) -> bool:
    """`t=SECONDS,v1=HEX`, with more than one `v1` while a secret is being replaced."""
    pairs = [part.strip().partition(b"=") for part in signature.split(b",")]
    times = [value for name, _, value in pairs if name == b"t"]
    signatures = [value for name, _, value in pairs if name == b"v1"]
    if len(times) != 1 or not times[0].isdigit() or len(times[0]) > 12 or len(signatures) > _MAX_SIGNATURES:
        return False
    expected = _hex(verify, times[0] + b"." + body)
    matching = [_equal(expected, one) for one in signatures]
    return any(matching) and abs(at - int(times[0])) <= TOLERANCE


def _hex(verify: Verify, content: bytes) -> bytes:
    return hmac.new(verify.secret.encode(), content, hashlib.sha256).hexdigest().encode()


def _equal(expected: bytes, given: bytes) -> bool:
    return hmac.compare_digest(expected, given)
