"""Connections that outlive the cell or the process that opened them: whose secrets they carry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from era.core.allowlist import allowlist
from era.core.secrets import Secret
from era.network import interception
from era.network.redaction import Redaction
from tests.network.conftest import NewSession
from tests.network.lab import GOOD, HOST, Ends, Lab, trusting
from tests.network.test_secrets import SECRETS
from tests.network.test_secrets import VALUE as CANARY

FIRST, LATER = (Secret(name, f"canary-{name}", allowlist([HOST]), plain_http=True) for name in ("FIRST", "LATER"))
MARK, LATER_MARK = FIRST.placeholder.encode(), LATER.placeholder.encode()


async def repeat(head: bytes, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer with what the header X-Key had."""
    (key,) = (line[7:] for line in head.split(b"\r\n") if line.startswith(b"X-Key: "))
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(key), key))


@pytest.fixture
async def lab(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lab]:
    monkeypatch.setattr(interception, "client_context", lambda: trusting(GOOD))
    one = Lab(secrets=[FIRST], answer=repeat)
    yield one
    await one.close()


async def said(lab: Lab, ends: Ends, key: bytes) -> tuple[bytes, bytes]:
    """What the server hears as the key, and what the program hears of it."""
    lab.heard = b""
    ends[1].write(b"GET / HTTP/1.1\r\nHost: %s\r\nX-Key: %s\r\n\r\n" % (HOST.encode(), key))
    async with asyncio.timeout(60):
        head = await ends[0].readuntil(b"\r\n\r\n")
        body = await ends[0].readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
    return lab.heard.split(b"X-Key: ")[1].split(b"\r\n")[0], body


async def test_each_request_has_the_secrets_of_its_moment(lab: Lab) -> None:
    ends = await lab.connect()
    assert await said(lab, ends, MARK) == (b"canary-FIRST", MARK)
    assert await said(lab, ends, LATER_MARK) == (LATER_MARK, LATER_MARK)
    (ours,) = lab.intercepted
    ours.add([LATER])
    assert await said(lab, ends, LATER_MARK) == (b"canary-LATER", LATER_MARK)
    ours.remove([FIRST])
    assert await said(lab, ends, MARK) == (MARK, MARK)
    assert await said(lab, ends, LATER_MARK) == (b"canary-LATER", LATER_MARK)
    ours.remove([LATER])
    assert await said(lab, ends, LATER_MARK) == (LATER_MARK, LATER_MARK)
    assert lab.traffic.secrets == {"FIRST", "LATER"}


async def test_a_connection_that_kept_its_secrets_would_swap_them_for_others(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weakened build: what a connection knows when it's opened is what it goes by."""
    monkeypatch.setattr(interception.Interception, "version", 0)
    ends = await lab.connect()
    assert await said(lab, ends, MARK) == (b"canary-FIRST", MARK)
    lab.intercepted[0].remove([FIRST])
    assert (await said(lab, ends, MARK))[0] == b"canary-FIRST"


async def test_a_body_that_is_still_to_come_waits_for_no_secret_that_has_gone(lab: Lab) -> None:
    """The head comes in time, and the body after the cell has ended."""
    ends = await lab.connect()
    head = b"POST / HTTP/1.1\r\nHost: %s\r\nX-Key: %s\r\nContent-Type: text/plain\r\nContent-Length: 43\r\n\r\n"
    ends[1].write(head % (HOST.encode(), MARK))
    await asyncio.sleep(0.1)
    lab.intercepted[0].remove([FIRST])
    ends[1].write(MARK)
    async with asyncio.timeout(60):
        await ends[0].readuntil(b"\r\n\r\n")
    assert lab.heard.count(MARK) == 2
    assert b"canary" not in lab.heard


@pytest.mark.parametrize("is_socket", [False, True])
async def test_values_that_come_later_are_looked_for_in_a_long_answer(lab: Lab, is_socket: bool) -> None:
    """Of the request's secret too, which has gone meanwhile. A WebSocket over which one comes is closed."""
    go_on = asyncio.Event()

    async def stream(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if is_socket:
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        writer.write(b"begun\n")
        await writer.drain()
        await go_on.wait()
        writer.write(b"canary-LATER, " + (b"" if is_socket else b"canary-FIRST ") + b"over\n")
        await writer.drain()
        writer.close()

    lab.answer = stream
    reader, writer = await lab.connect()
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n"
    writer.write(
        b"GET / HTTP/1.1\r\nHost: %s\r\n%sX-Key: %s\r\n\r\n" % (HOST.encode(), upgrade if is_socket else b"", MARK)
    )
    async with asyncio.timeout(60):
        await reader.readuntil(b"begun\n")
        lab.intercepted[0].add([LATER])
        lab.intercepted[0].remove([FIRST])
        go_on.set()
        rest = await reader.read()
    assert b"canary" not in rest
    if is_socket:
        assert b"over" not in rest
    else:
        assert LATER_MARK in rest
        assert MARK in rest


async def test_they_are_looked_for_also_where_there_was_none_when_the_answer_began(lab: Lab) -> None:
    go_on = asyncio.Event()

    async def stream(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000020\r\n\r\n" + b"begun\n")
        await writer.drain()
        await go_on.wait()
        writer.write(b"canary-LATER\n" + b"x" * 1_000_001)
        await writer.drain()

    ends = await lab.connect()
    lab.intercepted[0].remove([FIRST])
    lab.answer = stream
    ends[1].write(b"GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % HOST.encode())
    async with asyncio.timeout(60):
        rest = await ends[0].readuntil(b"begun\n")
        lab.intercepted[0].add([LATER])
        go_on.set()
        rest += await ends[0].read()
    assert b"canary" not in rest
    assert LATER_MARK in rest
    assert rest.count(b"x" * 1000) > 900


async def test_secrets_of_other_hosts_make_no_work(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = await lab.connect()
    await said(lab, ends, MARK)
    (ours,) = lab.intercepted
    asked = []

    async def counted(secrets: list[Secret]) -> Redaction:
        asked.append(secrets)
        return await interception.Interception.redaction(ours, secrets)

    monkeypatch.setattr(ours, "redaction", counted)
    others = [Secret("OTHER", "canary-OTHER", allowlist(["other.test"]))]
    ours.add(others)
    assert await said(lab, ends, MARK) == (b"canary-FIRST", MARK)
    ours.remove(others)
    assert await said(lab, ends, MARK) == (b"canary-FIRST", MARK)
    assert asked == []
    ours.add([LATER])
    assert await said(lab, ends, LATER_MARK) == (b"canary-LATER", LATER_MARK)
    assert asked == [[FIRST, LATER]]


NODE = f"""
await (async () => {{
  const token = process.env.TOKEN
  const answer = await fetch('https://api.example.test/hello', {{ headers: {{ 'X-Token': token }} }})
  const {{ length }} = await answer.json()
  console.log(length === {len(CANARY)} ? 'the value' : length === token.length ? 'as it is' : length)
}})()
"""
PYTHON = f"""
import http.client, json, os, ssl
def ask(token):
    kept.request("GET", "/hello", headers={{"X-Token": token}})
    length = json.loads(kept.getresponse().read())["length"]
    print({{{len(CANARY)}: "the value", len(token): "as it is"}}.get(length, length))
"""


def test_a_pool_of_a_context_is_good_for_all_of_its_cells(session: NewSession) -> None:
    """Node's fetch keeps connections by itself."""
    one = session("node")
    assert [one.run(NODE, context="main", secrets=SECRETS)["stdout"] for _ in range(3)] == ["the value\n"] * 3


def test_the_next_cell_has_nothing_of_the_secrets_of_the_last(session: NewSession) -> None:
    one = session()
    opened = (
        PYTHON + "kept = http.client.HTTPSConnection('api.example.test', timeout=60)\n"
        "was = os.environ['TOKEN']; ask(was); here = kept.sock.getsockname()"
    )
    assert one.run(opened, context="main", secrets=SECRETS)["stdout"] == "the value\n"
    again = "ask(was); print(here == kept.sock.getsockname())"
    assert one.run(again, context="main")["stdout"] == "as it is\nTrue\n"
    anew = "ask(os.environ['TOKEN']); print(here == kept.sock.getsockname())"
    assert one.run(anew, context="main", secrets=SECRETS)["stdout"] == "the value\nTrue\n"
