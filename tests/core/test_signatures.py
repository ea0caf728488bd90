"""Signatures of deliveries: valid ones, and all ways to be invalid."""

from __future__ import annotations

import base64
import hashlib
import hmac

import pytest

from era.core.signatures import HEADERS, TOLERANCE, Scheme, Verify, is_genuine

SECRET, BODY, AT = "s3cret", b'{"a": "\xc3\xa9\0"}', 1_700_000_000


def hexed(content: bytes = BODY, secret: str = SECRET) -> str:
    return hmac.new(secret.encode(), content, hashlib.sha256).hexdigest()


def stripe(at: int = AT, body: bytes = BODY, secret: str = SECRET) -> str:
    return hexed(str(at).encode() + b"." + body, secret)


def genuine(scheme: Scheme, *signatures: str, body: bytes = BODY, header: str = "") -> bool:
    name = header or HEADERS[scheme]
    headers = [(b"host", b"x"), *((name.title().encode(), one.encode()) for one in signatures)]
    return is_genuine(Verify(scheme, SECRET, name), headers, body, AT)


def test_the_example_of_githubs() -> None:
    verify = Verify("github", "It's a Secret to Everybody", HEADERS["github"])
    signature = b"sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    assert is_genuine(verify, [(b"X-Hub-Signature-256", signature)], b"Hello, World!", AT)
    assert not is_genuine(verify, [(b"X-Hub-Signature-256", signature)], b"Hello, World?", AT)


RIGHT: list[tuple[Scheme, str]] = [
    ("github", f"sha256={hexed()}"),
    ("stripe", f"t={AT},v1={stripe()}"),
    ("stripe", f"t={AT}, v0=abc, v1={'0' * 64}, v1={stripe()}"),
    ("stripe", f"t={AT - TOLERANCE},v1={stripe(AT - TOLERANCE)}"),
    ("stripe", f"t={AT + TOLERANCE},v1={stripe(AT + TOLERANCE)}"),
    ("hmac", hexed()),
    ("hmac", hexed().upper()),
    ("hmac", f"sha256={hexed()}"),
    ("hmac", base64.b64encode(bytes.fromhex(hexed())).decode()),
]
WRONG: list[tuple[Scheme, str]] = [
    *((scheme, "") for scheme in HEADERS),
    *((scheme, hexed(secret="other")) for scheme in HEADERS),
    ("github", hexed()),
    ("github", f"sha1={hexed()}"),
    ("github", f"sha256={hexed()[:-1]}"),
    ("github", f"sha256={hexed()}0"),
    ("github", "sha256="),
    ("stripe", f"t={AT},v1={stripe(secret='other')}"),
    ("stripe", f"t={AT},v0={stripe()}"),
    ("stripe", f"t={AT},v1={hexed()}"),
    ("stripe", f"v1={stripe()}"),
    ("stripe", f"t={AT},t={AT + 1},v1={stripe()}"),
    ("stripe", f"t=,v1={hexed(b'.' + BODY)}"),
    ("stripe", f"t={'9' * 5000},v1={stripe()}"),
    ("stripe", f"t={AT - TOLERANCE - 1},v1={stripe(AT - TOLERANCE - 1)}"),
    ("stripe", f"t={AT + TOLERANCE + 1},v1={stripe(AT + TOLERANCE + 1)}"),
    ("stripe", f"t={AT},{','.join([f'v1={stripe()}'] * 17)}"),
    ("hmac", "sha256="),
    ("hmac", "\u00e9"),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "signature"), RIGHT)
def test_right(scheme: Scheme, signature: str) -> None:
    assert genuine(scheme, signature)
    assert genuine(scheme, signature, header="x-own")
    assert not genuine(scheme, signature, body=BODY + b" ")
    assert not genuine(scheme, signature, signature)  # two headers are ambiguous
    assert not genuine(scheme)


@pytest.mark.parametrize(("scheme", "signature"), WRONG)
def test_wrong(scheme: Scheme, signature: str) -> None:
    assert not genuine(scheme, signature)
