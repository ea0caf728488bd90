"""Challenges of sessions: whatever a program answers, a browser takes none for that of another session."""

from __future__ import annotations

import pytest

from era.core.public import headers

REALM = "/proxy/s/"
OURS = f'Basic realm="{REALM}", charset="UTF-8"'


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        ('Basic realm="x"', [OURS]),
        ("basic", [OURS]),
        ("BASIC REALM=x, charset = UTF-8", [OURS]),
        ('Basic realm="/proxy/other/"', [OURS]),
        (r'Basic realm="a\", Digest realm=\"b"', [OURS]),
        ('Basic realm="x", realm="/proxy/other/"', [OURS]),
        ('Basic realm="x", Basic realm="y"', [OURS]),
        (" , Basic realm=x,, Bearer", [OURS, "Bearer"]),
        ('Bearer realm="x", error="invalid_token"', ['Bearer realm="x", error="invalid_token"']),
        ('Bearer a="1", Basic realm="x", DPoP algs="ES256"', ['Bearer a="1"', OURS, 'DPoP algs="ES256"']),
        ("Bearer abc==", ["Bearer abc=="]),
        ('Digest realm="x", nonce="1", domain="/"', []),
        ('Digest realm="x", nonce="1", Basic realm="y"', [OURS]),
        ("Negotiate", []),
        ("Negotiate abc==, NTLM, Kerberos", []),
        ("Unknown", []),
        ('Bearer a="1, Basic realm=x', []),  # a quote that isn't closed
        ('Bearer a="1" Basic realm="x"', []),
        ("Bearer a=1; Basic realm=x", []),
        ("Basic realm='a, Basic realm=b'", [OURS]),
        ("Basic: realm=x", []),
        ("", []),
        (",", []),
    ],
)
def test_only_those_of_its_own_realm_are_sent(value: str, sent: list[str]) -> None:
    assert headers._challenges_allowed(value, REALM) == sent
    assert headers._challenges_allowed(value, None) == [one for one in sent if one != OURS]


def test_the_place_of_a_session_decides() -> None:
    """A browser sends credentials to all that is below the directory in which it was asked."""
    for path in ("/proxy/s/", "/proxy/s/80", "/proxy/s/80/", "/proxy/s/80/a/b"):
        assert headers.place("", "s", path.encode()).realm == REALM
        assert headers.place("/above", "s", path.encode()).realm == "/above/proxy/s/"
    for path in ("/proxy/s", "/proxy/other/80/", "/proxy/%73/80/", "/proxy%2Fx/s/80/", "/proxy/s%2F80"):
        assert headers.place("", "s", path.encode()).realm is None


def test_what_no_session_can_have_asked_for_is_dropped() -> None:
    for value in ("Digest username=a", "negotiate abc", "NTLM abc", "  Kerberos x"):
        assert headers.of_request([(b"authorization", value.encode())], None) == []
    for value in ("Basic YTpi", "Bearer x", "AWS4-HMAC-SHA256 Credential=x", "token"):
        assert headers.of_request([(b"authorization", value.encode())], None) == [("authorization", value)]
