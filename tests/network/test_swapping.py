"""Where the values of secrets are swapped in, and where not."""

from __future__ import annotations

import base64
import gzip
import json
from urllib.parse import parse_qs, unquote

import pytest

from era.core.allowlist import allowlist
from era.core.secrets import Secret
from era.network.authority import Authority
from tests.network.lab import GOOD, HOST, OTHER, VALUE, Lab, request


@pytest.mark.parametrize("authority", [GOOD, None], ids=["https", "http"])
async def test_in_headers_and_not_in_targets(lab: Lab, authority: Authority | None) -> None:
    token = lab.token.decode()
    basic = base64.b64encode(f"me:{token}".encode()).decode()
    asked = request(f"/a%20{token}?q={token}&r=1", f"X-KEY: k {token} {token}", f"Authorization: Basic {basic}")
    assert (await lab.ask(asked, authority=authority)).endswith(b"\r\n\r\nfine")
    line, *lines = lab.heard.decode().split("\r\n")
    path, _, query = line.split()[1].partition("?")
    assert unquote(path) == f"/a {token}"
    assert parse_qs(query) == {"q": [token], "r": ["1"]}
    told = dict(one.split(": ", 1) for one in lines if one)
    assert told["X-KEY"] == f"k {VALUE} {VALUE}"
    assert base64.b64decode(told["Authorization"].removeprefix("Basic ")).decode() == f"me:{VALUE}"
    assert lab.traffic.secrets == {"TOKEN"}
    assert lab.noted == [(HOST, None)]
    assert lab.traffic.sent == len(asked)


@pytest.mark.parametrize("kind", ["application/json", "application/vnd.api+json; charset=utf-8", "text/plain", "form"])
async def test_in_bodies_as_they_write_it(lab: Lab, kind: str) -> None:
    token, key = (one.placeholder for one in lab.secrets)
    content_type, body, read = {
        "text/plain": ("text/plain", f"{token} {key}!", lambda text: text),
        "form": ("application/x-www-form-urlencoded", f"a={token}&b={key}", lambda text: parse_qs(text)),
    }.get(kind, (kind, json.dumps({"a": token, key: 1}), json.loads))
    await lab.ask(request("/", f"Content-Type: {content_type}", body=body.encode(), method="POST"))
    head, _, sent = lab.heard.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(sent)}".encode() in head
    assert read(sent.decode()) in (f"{VALUE} k2!", {"a": [VALUE], "b": ["k2"]}, {"a": VALUE, "k2": 1})
    assert lab.traffic.secrets == {"TOKEN", "KEY"}


async def test_not_in_anything_else(lab: Lab) -> None:
    """What isn't swapped goes out as the placeholder that it is."""
    token = lab.token
    bodies = {
        "Content-Type: application/octet-stream": token,
        "X: no type": token,
        "Content-Type: text/plain\r\nContent-Encoding: gzip": gzip.compress(token),
        "Content-Type: text/css": token + bytes(1 << 20),
    }
    for headers, body in bodies.items():
        await lab.ask(request("/", headers, body=body, method="POST"))
        assert lab.heard.endswith(body)
    split = token[:20] + b" " + token[20:], token.upper(), token[:-1], token.hex().encode(), b"era_secret_" + b"0" * 32
    await lab.ask(request("/", *(f"X-{n}: {one.decode()}" for n, one in enumerate(split))))
    chunked = b"POST / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\nContent-Type: text/plain\r\n" % HOST.encode()
    await lab.ask(chunked + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(token), token))
    # A secret of another host, and headers that say where a request goes or ends.
    other = Secret("OTHER", "canary", allowlist([OTHER]))
    lab.secrets.append(other)
    await lab.ask(request("/", f"X: {other.placeholder}", f"TE: {token.decode()}"))
    assert b"canary" not in lab.heard
    assert lab.traffic.secrets == set()
    assert all(one in lab.heard for one in (*split, other.placeholder.encode(), b"TE: " + token))


async def test_too_much_is_refused(lab: Lab) -> None:
    """A program can't have us make gigabytes of a small request."""
    lab.secrets[0] = Secret("TOKEN", "canary" * 1000, allowlist([HOST]))
    token = lab.token.decode()
    for asked in (
        request("/", f"X: {token * 400}"),
        request("/", "Content-Type: text/plain", body=lab.token * 20_000, method="POST"),
    ):
        assert (await lab.ask(asked)).startswith(b"HTTP/1.1 413 ")
    assert (await lab.ask(request("/" + "a" * (400 << 10)))).startswith(b"HTTP/1.1 400 ")
    assert lab.heard == b""


async def test_what_cannot_be_written_is_refused_in_our_words(lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    """Values with controls are refused at the edge. Should one get here, no error quotes it."""
    lab.secrets[0] = Secret("TOKEN", "canary\r\nX-Injected: 1", allowlist([HOST]))
    heard = await lab.ask(request("/", f"X: {lab.token.decode()}"))
    assert heard.startswith(b"HTTP/1.1 400 ")
    assert b"canary" not in heard
    assert lab.heard == b""
    assert lab.traffic.secrets == set()
    assert "canary" not in "".join(capfd.readouterr())
