"""Programs and servers that want a secret's value to go elsewhere. Each attack is also made without its wall."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Collection
from types import ModuleType

import pytest

from era.core.allowlist import Address
from era.network import exchange, interception
from tests.network.lab import EVIL, FINE, GOOD, HOST, OTHER, Lab, request, trusting


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
        GOOD.context = lambda host: other  # type: ignore[method-assign]
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
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("weakened", [False, True], ids=["sound", "weakened"])
async def test_attacks(lab: Lab, monkeypatch: pytest.MonkeyPatch, attack: Attack, weakened: bool) -> None:
    succeeded, module, name, weak = ATTACKS[attack]
    if weakened:
        monkeypatch.setattr(module, name, weak)
    await attack(lab)
    assert succeeded(lab) is weakened
    assert weakened or "TOKEN" not in lab.traffic.secrets
