"""Programs and servers that want a secret's value to go elsewhere. Each attack is also made without its wall."""

from __future__ import annotations

import asyncio
import base64
import gzip
import html
import json
import re
import ssl
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import replace
from types import ModuleType
from urllib.parse import quote

import h11
import pytest

from era.core.allowlist import Address
from era.core.secrets import PLACEHOLDER, Secret
from era.network import exchange, interception, redaction
from era.network.http1 import Fields
from tests.network.lab import EVIL, FINE, GOOD, HOST, OTHER, VALUE, Answer, Lab, request, trusting


async def fronting(lab: Lab) -> None:
    """A server that serves others, too, is asked for another one."""
    await lab.ask(request("/", f"X: {lab.token.decode()}", host=OTHER))


async def fronting_later(lab: Lab) -> None:
    reader, writer = await lab.connect()
    writer.write(f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
    await reader.readexactly(len(FINE))
    writer.write(request("/", f"X: {lab.token.decode()}", host=OTHER))
    await reader.read()


async def impostor(lab: Lab) -> None:
    """Somebody says that he is the host."""
    heard = await lab.ask(request("/", f"X: {lab.token.decode()}"), authority=EVIL)
    assert b" 502 " in heard.split(b"\r\n")[0] or lab.heard


async def namesake(lab: Lab) -> None:
    """Somebody else's good certificate."""
    other, real = GOOD.context(OTHER), GOOD.context
    try:
        GOOD.context = lambda host, *, kept=True: other  # type: ignore[method-assign]
        await lab.ask(request("/", f"X: {lab.token.decode()}"))
    finally:
        GOOD.context = real  # type: ignore[method-assign]


async def claimed(lab: Lab) -> None:
    """Without TLS another server is asked for the host."""
    await lab.ask(request("/", f"X: {lab.token.decode()}"), authority=None, names=(OTHER,))


async def absolute(lab: Lab) -> None:
    """The target names another host than `Host`."""
    await lab.ask(request(f"http://{OTHER}/", f"X: {lab.token.decode()}"))


async def dropped(lab: Lab) -> None:
    """Whoever comes next is told to drop what says where the request ends."""
    await lab.ask(request("/", "Connection: close, Content-Length", body=b"GET /x", method="POST"))


async def smuggled(lab: Lab) -> None:
    """What one reader takes for a body is a request to another host, to another reader."""
    inner = f"GET /smuggled HTTP/1.1\r\nHost: {OTHER}\r\nX: {lab.token.decode()}\r\n\r\n".encode()
    head = request("/", f"Content-Length: {len(inner)}", method="POST").removesuffix(b"\r\n")
    await lab.ask(head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(inner), inner))


def repeating(write: Callable[[bytes], bytes], head: bytes = b"HTTP/1.1 200 OK\r\n") -> Answer:
    """A server that answers with the request as `write` writes it."""

    async def answer(said: bytes, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = write(said)
        writer.write(head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))

    return answer


async def error_page(lab: Lab) -> None:
    lab.answer = repeating(lambda said: b"<h1>No such page</h1><pre>" + html.escape(said.decode()).encode() + b"</pre>")
    await told(lab)


async def json_page(lab: Lab) -> None:
    lab.answer = repeating(lambda said: json.dumps({"headers": said.decode()}).encode())
    await told(lab)


async def large_page(lab: Lab) -> None:
    lab.answer = repeating(lambda said: said * 1000)
    await told(lab)


async def login_page(lab: Lab) -> None:
    """Basic's credentials come back as they were sent."""
    lab.answer = repeating(lambda said: said)
    basic = base64.b64encode(b"me:" + lab.token).decode()
    lab.told += await lab.ask(request("/", f"Authorization: Basic {basic}"))


async def redirect(lab: Lab) -> None:
    """From https to http, where the host itself isn't asked for a certificate."""

    async def answer(said: bytes, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        value = said.split(b"X: ")[1].split(b"\r\n")[0].decode()
        where = f"http://{HOST}/?key={quote(value)}".encode()
        writer.write(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + where + b"\r\n\r\n")

    lab.answer = answer
    await told(lab)


async def in_pieces(lab: Lab) -> None:
    """In chunks that end anywhere."""

    async def answer(said: bytes, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for at in range(len(said)):
            writer.write(b"1\r\n%b\r\n" % said[at : at + 1])
            await writer.drain()
        writer.write(b"0\r\nX-Trailer: " + said.split(b"X: ")[1].split(b"\r\n")[0] + b"\r\n\r\n")

    lab.answer = answer
    await told(lab)
    lab.told = re.sub(rb"\r\n[0-9a-f]+\r\n", b"", lab.told)


async def compressed(lab: Lab) -> None:
    lab.answer = repeating(gzip.compress, b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n")
    await told(lab, "Accept-Encoding: gzip")
    body = lab.told.partition(b"\r\n\r\n")[2]
    lab.told += gzip.decompress(body) if body[:2] == b"\x1f\x8b" else b""


async def traced(lab: Lab) -> None:
    lab.answer = repeating(lambda said: said)
    lab.told += await lab.ask(request("/", f"X: {lab.token.decode()}", method="TRACE"))


async def by_websocket(lab: Lab) -> None:
    async def answer(said: bytes, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        for at in range(0, len(said), 7):
            writer.write(said[at : at + 7])
            await writer.drain()
            await asyncio.sleep(0.001)
        raise ConnectionError

    lab.answer = answer
    reader, writer = await lab.connect()
    head = b"GET /s HTTP/1.1\r\nHost: %b\r\nX: %b\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    writer.write(head % (HOST.encode(), lab.token))
    with suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            lab.told += data


async def told(lab: Lab, *headers: str) -> None:
    lab.told += await lab.ask(request("/", f"X: {lab.token.decode()}", *headers))


async def in_the_clear(lab: Lab) -> None:
    """A secret for which nobody has asked that."""
    lab.secrets = [replace(one, plain_http=False) for one in lab.secrets]
    await lab.ask(request("/", f"X: {lab.token.decode()}"), authority=None)


async def in_the_target(lab: Lab) -> None:
    await lab.ask(request(f"/?key={lab.token.decode()}"))


def told_canary(lab: Lab) -> bool:
    return b"canary" in lab.told or base64.b64encode(b"me:" + VALUE.encode()) in lab.told


def heard_traced(lab: Lab) -> bool:
    return lab.heard.startswith(b"TRACE")


def heard_canary(lab: Lab) -> bool:
    return b"canary" in lab.heard


def heard_two_lengths(lab: Lab) -> bool:
    return b"Transfer-Encoding" in lab.heard and b"Content-Length" in lab.heard


def heard_what_to_drop(lab: Lab) -> bool:
    return b"Connection: close, Content-Length" in lab.heard


def heard_two_hosts(lab: Lab) -> bool:
    return OTHER.encode() in lab.heard.partition(b"\r\n")[0]


def careless_context() -> ssl.SSLContext:
    context = trusting(GOOD)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class Credulous(interception.Interception):
    """Believes what a request's `Host` says."""

    def _classify(self, first: bytes, address: Address, names: Collection[str]) -> interception.Opening | None:
        return super()._classify(first, address, (HOST,))


def everywhere(request: h11.Request, headers: Fields) -> h11.Request:
    """Swaps in targets, too."""
    return h11.Request(method=request.method, target=PLACEHOLDER.sub(b"canary", request.target), headers=headers)


class Generous(interception.Interception):
    """Sends every secret over plain HTTP."""

    def secrets_for(self, host: str, *, tls: bool) -> list[Secret]:
        return super().secrets_for(host, tls=True)


NOTHING: tuple[Callable[[Lab], bool], ModuleType, str, object] = (
    told_canary,
    interception,
    "Redaction",
    lambda _: redaction.Redaction([]),
)
"""Looks for nothing in answers."""

type Attack = Callable[[Lab], Awaitable[None]]

ATTACKS: dict[Attack, tuple[Callable[[Lab], bool], ModuleType, str, object]] = {
    fronting: (heard_canary, exchange, "named_host", lambda _: HOST),
    fronting_later: (heard_canary, exchange, "named_host", lambda _: HOST),
    impostor: (heard_canary, interception, "client_context", careless_context),
    namesake: (heard_canary, interception, "client_context", careless_context),
    claimed: (heard_canary, interception, "Interception", Credulous),
    absolute: (heard_two_hosts, exchange, "_check", lambda *_: None),
    dropped: (heard_what_to_drop, exchange, "_check", lambda *_: None),
    smuggled: (heard_two_lengths, exchange, "_check", lambda *_: None),
    in_the_clear: (heard_canary, interception, "Interception", Generous),
    in_the_target: (heard_canary, exchange, "_rewritten", everywhere),
    traced: (heard_traced, exchange, "_check", lambda *_: None),
    **dict.fromkeys(
        (error_page, json_page, large_page, login_page, redirect, in_pieces, compressed, by_websocket), NOTHING
    ),
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("weakened", [False, True], ids=["sound", "weakened"])
async def test_attacks(lab: Lab, monkeypatch: pytest.MonkeyPatch, attack: Attack, weakened: bool) -> None:
    succeeded, module, name, weak = ATTACKS[attack]
    if weakened:
        monkeypatch.setattr(module, name, weak)
    await attack(lab)
    assert succeeded(lab) is weakened
    if succeeded is not told_canary:
        assert weakened or "TOKEN" not in lab.traffic.secrets
    elif not weakened:
        assert b"canary" in lab.heard or attack is login_page
