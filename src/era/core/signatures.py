"""Signatures of webhooks, HMAC-SHA256 of the raw body: verified as they come in, and made for those that go out.

The schemes differ in the header that holds the signature, and in how it is written there. Signatures are compared in
constant time. Sources: GitHub, "Validating webhook deliveries"; Stripe, "Verify webhook signatures manually".
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
"""The header that holds the signature, where the inbox names no other."""

TOLERANCE = 300
"""Seconds by which the time in a signature may differ from ours, either way."""

_MAX_SIGNATURES = 16


@dataclass(frozen=True, slots=True)
class Verify:
    """How deliveries of an inbox are verified. `header` is in lower case."""

    scheme: Scheme
    secret: str = field(repr=False)
    header: str


def is_genuine(verify: Verify, headers: Sequence[tuple[bytes, bytes]], body: bytes, at: float) -> bool:
    """Whether a request is signed with the secret. `headers` are as received, `at` is now, in seconds since 1970."""
    values = [value for name, value in headers if name.decode("latin-1").lower() == verify.header]
    if len(values) != 1:  # with several, a proxy in front may have checked another one than we would
        return False
    signature = values[0].strip()
    match verify.scheme:
        case "github":
            return _equal(b"sha256=" + _hex(verify.secret, body), signature)
        case "stripe":
            return _is_genuine_stripe(verify, signature, body, at)
        case "hmac":
            signature = signature.removeprefix(b"sha256=")
            expected = _hex(verify.secret, body)
            # Hex and base64 are both tried, whatever the first says, so that the time taken reveals nothing.
            as_hex = _equal(expected, signature.lower())
            return _equal(base64.b64encode(bytes.fromhex(expected.decode())), signature) or as_hex


def signed(secret: str, body: bytes, at: int) -> str:
    """Return the signature of a body in Stripe's form, made at a time in seconds since 1970."""
    return f"t={at},v1={_hex(secret, b'%d.' % at + body).decode()}"


def _is_genuine_stripe(verify: Verify, signature: bytes, body: bytes, at: float) -> bool:
    """Verify Stripe's form, `t=SECONDS,v1=HEX`, with several `v1` while a secret is being replaced."""
    pairs = [part.strip().partition(b"=") for part in signature.split(b",")]
    times = [value for name, _, value in pairs if name == b"t"]
    signatures = [value for name, _, value in pairs if name == b"v1"]
    if len(times) != 1 or not times[0].isdigit() or len(times[0]) > 12 or len(signatures) > _MAX_SIGNATURES:
        return False
    expected = _hex(verify.secret, times[0] + b"." + body)
    matching = [_equal(expected, candidate) for candidate in signatures]
    return any(matching) and abs(at - int(times[0])) <= TOLERANCE


def _hex(secret: str, content: bytes) -> bytes:
    """HMAC-SHA256 of `content`, in hexadecimal."""
    return hmac.new(secret.encode(), content, hashlib.sha256).hexdigest().encode()


def _equal(expected: bytes, received: bytes) -> bool:
    return hmac.compare_digest(expected, received)
