"""Where webhooks may lead: nowhere that programs may not. Each attack succeeds once its wall is taken out.
(That notices arrive, by a policy that is whole, is in test_out.py.)"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address

import pytest

from era.core.allowlist import Address
from era.core.owners.webhooks import Unsent
from era.errors import BadRequest
from era.network import dialing, webhooks
from era.network.policy import Policy
from era.network.webhooks import WebhookSender

PUBLIC = "93.184.215.14"
LOCAL = "127.0.0.1"


class Everywhere(Policy):
    """A policy with its wall taken out."""

    def refuses(self, address: Address) -> None:
        return None


def without_walls() -> WebhookSender:
    sender = WebhookSender(Policy())
    sender._policy = Everywhere()
    return sender


@dataclass
class Target:
    """A server on this machine that a webhook could lead to."""

    port: int = 0
    answer: bytes = b"HTTP/1.1 204 No Content\r\n\r\n"
    requests: list[bytes] = field(default_factory=list)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        self.requests.append(head + await reader.readexactly(length))
        writer.write(self.answer)
        await writer.drain()
        writer.close()


@asynccontextmanager
async def listening(answer: bytes = Target.answer) -> AsyncIterator[Target]:
    target = Target(answer=answer)
    server = await asyncio.start_server(target.handle, LOCAL)
    target.port = server.sockets[0].getsockname()[1]
    async with server:
        yield target


@dataclass
class Resolver:
    """Answers each question with the next address, and the last one for ever."""

    addresses: list[str]
    asked: list[str] = field(default_factory=list)

    async def __call__(self, host: str, port: int) -> Sequence[Address]:
        self.asked.append(host)
        address = self.addresses[0] if len(self.addresses) == 1 else self.addresses.pop(0)
        return [ip_address(address)]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/",
        "http://localhost:{port}/",
        "http://[::1]:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://2130706433:{port}/",
        "http://0177.1:{port}/",
        "http://0.0.0.0:{port}/",
        "http://10.0.0.1/",
        "http://192.168.1.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://[fd00::1]/",
        "http://100.64.0.1/",
    ],
)
async def test_private_addresses_are_refused_as_egress_is(url: str) -> None:
    sender = WebhookSender(Policy())
    async with listening() as target:
        url = url.format(port=target.port)
        with pytest.raises(Unsent):
            await sender.send(url, {}, b"{}")
        assert target.requests == []
        with pytest.raises(BadRequest) as refused:
            await sender.check(url)
        assert refused.value.code == "webhook_refused"
        assert "ERA_EGRESS_PRIVATE" in refused.value.hint


async def test_without_the_policy_the_attack_succeeds() -> None:
    async with listening() as target:
        sender = without_walls()
        url = f"http://127.0.0.1:{target.port}/in?a=1"
        await sender.check(url)
        assert await sender.send(url, {"X-Era-Event": "run.ended"}, b'{"n":1}') == 204
        [request] = target.requests
        assert request.startswith(b"POST /in?a=1 HTTP/1.1\r\n")
        assert request.endswith(b'\r\n\r\n{"n":1}')


async def test_a_name_that_leads_elsewhere_later_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: public when the webhook is made, this machine when it is sent; or within one sending."""
    connected: list[str] = []

    async def connect(address: Address, port: int) -> None:
        connected.append(str(address))
        raise ConnectionRefusedError(111, "Connection refused")

    async with listening() as target:
        url = f"http://rebinding.example:{target.port}/"
        sender = WebhookSender(Policy(), Resolver([PUBLIC, LOCAL]))
        await sender.check(url)
        with pytest.raises(Unsent, match="loopback"):
            await sender.send(url, {}, b"{}")
        assert target.requests == []
        # What is connected to is the address that was judged: the name is asked for once.
        resolve = Resolver([PUBLIC, LOCAL])
        with monkeypatch.context() as dialled:
            dialled.setattr(dialing, "connect", connect)
            with pytest.raises(Unsent):
                await WebhookSender(Policy(), resolve).send(url, {}, b"{}")
        assert (resolve.asked, connected) == (["rebinding.example"], [PUBLIC])
        # A sender that judges one answer and connects by the next is taken in.
        weak = WebhookSender(Policy(), Resolver([PUBLIC, LOCAL]))
        judge = weak._allowed

        def judged_only(addresses: Sequence[Address]) -> Sequence[Address]:
            judge(addresses)
            return [ip_address(LOCAL)]

        monkeypatch.setattr(weak, "_allowed", judged_only)
        assert await weak.send(url, {}, b"{}") == 204
        assert len(target.requests) == 1


async def test_a_redirect_is_an_answer_and_not_followed() -> None:
    async with listening() as inside:
        location = f"http://127.0.0.1:{inside.port}/secret".encode()
        async with listening(b"HTTP/1.1 307 Temporary Redirect\r\nLocation: " + location + b"\r\n\r\n") as outside:
            sender = without_walls()
            assert await sender.send(f"http://127.0.0.1:{outside.port}/", {}, b"{}") == 307
            assert (len(outside.requests), inside.requests) == (1, [])


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "hung up without an answer"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "hung up without an answer"),
        (b"nonsense\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"x" * 100_000, "not HTTP"),
    ],
)
async def test_what_is_no_answer(answer: bytes, why: str) -> None:
    async with listening(answer) as target:
        with pytest.raises(Unsent, match=why):
            await without_walls().send(f"http://127.0.0.1:{target.port}/", {}, b"{}")


@pytest.mark.parametrize("bounded", [True, False], ids=["", "weakened"])
async def test_announcements_without_end_are_no_answer(monkeypatch: pytest.MonkeyPatch, *, bounded: bool) -> None:
    """Parsing them keeps the service busy, so it is given up soon, and not at the end of the time for an answer."""
    if not bounded:
        monkeypatch.setattr(webhooks, "_MAX_INFORMATIONAL", 1 << 30)
    async with listening(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 16 + Target.answer) as target:
        assert await without_walls().send(f"http://127.0.0.1:{target.port}/", {}, b"{}") == 204
    async with listening(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000 + Target.answer) as target:
        sending = without_walls().send(f"http://127.0.0.1:{target.port}/", {}, b"{}")
        if bounded:
            with pytest.raises(Unsent, match="again and again"):
                await sending
        else:
            assert await sending == 204, "all of them were read"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com",
        "ftp://example.com/",
        "file:///etc/passwd",
        "http://",
        "http://user:secret@example.com/",
        "https://example.com/#part",
        "https://example.com:99999/",
        "https://example.com/a b",
        "https://example.com/\r\nX: y",
        "https://exämple.com/",
        "https://example.com/" + "x" * 2048,
    ],
)
async def test_what_is_no_url_of_a_webhook(url: str) -> None:
    with pytest.raises(BadRequest) as refused:
        await WebhookSender(Policy()).check(url)
    assert "https://" in refused.value.hint
