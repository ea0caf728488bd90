"""HTTP/1.1 on connections of programs: reading the head of a request and answering with a refusal. On h11."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

import h11

from era.core.concurrency.streams import write

MAX_HEAD = 64 << 10
"""Bytes that the head of a message may have."""

HEAD_SECONDS = 10.0
"""Within which the head of a request must be complete."""

CHUNK = 1 << 18
"""Bytes that are read at a time."""

_LINGER_SECONDS, _LINGER_BYTES = 1.0, 1 << 20

type Fields = list[tuple[bytes, bytes]]
"""Headers, names as they were written."""

type Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Refused(Exception):
    """A request that isn't served: `status` of the answer, the `rule` or kind of failure, and `why` as a sentence."""

    def __init__(self, status: int, rule: str, why: str) -> None:
        super().__init__(why)
        self.status, self.rule, self.why = status, rule, why


def parse_request_head(data: bytes) -> h11.Request | None:
    """The request that `data` begins with, None while its head is incomplete. Raises h11.RemoteProtocolError."""
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    parser.receive_data(data)
    event = parser.next_event()
    return event if isinstance(event, h11.Request) else None


async def read_request_head(reader: asyncio.StreamReader) -> h11.Request:
    """Read the head of a request. Raises Refused, and asyncio.IncompleteReadError where the program hangs up."""
    try:
        async with asyncio.timeout(HEAD_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
    except TimeoutError:
        raise Refused(408, "too_slow", f"the request's head was not complete after {HEAD_SECONDS:g} seconds") from None
    except asyncio.LimitOverrunError:
        raise Refused(431, "head_too_large", f"the request's head is over {MAX_HEAD >> 10} KiB") from None
    try:
        request = parse_request_head(head)
    except h11.RemoteProtocolError:
        request = None
    if request is None:
        raise Refused(400, "bad_request", "this is no HTTP request")
    return request


async def serve_connection(client: socket.socket, handle: Callable[[Ends], Awaitable[None]]) -> None:
    """Have `handle` serve a program's connection, and answer with the Refused that it raises. Connection errors are
    swallowed: one of the two ends is gone. The caller closes `client`."""
    ends = await asyncio.open_connection(sock=client, limit=MAX_HEAD)
    try:
        try:
            await handle(ends)
        except Refused as refusal:
            await _refuse(ends, refusal)
    except (OSError, asyncio.IncompleteReadError, TimeoutError):
        pass
    finally:
        ends[1].transport.abort()


def refusal_events(refusal: Refused) -> tuple[h11.Response, h11.Data, h11.EndOfMessage]:
    """The answer to a refused request. The reason stands in the status line too: some clients show nothing else."""
    body = json.dumps({"error": f"ERA's proxy: {refusal.why}.", "rule": refusal.rule}).encode() + b"\n"
    fields = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
    reason = re.sub(r"[^ -~]", "?", refusal.why)[:200].encode()
    head = h11.Response(status_code=refusal.status, headers=fields, reason=reason)
    return head, h11.Data(data=body), h11.EndOfMessage()


async def _refuse(client: Ends, refusal: Refused) -> None:
    """Answer, and wait a little for the client to stop sending: closing before would take the answer back."""
    reader, writer = client
    answer = h11.Connection(h11.SERVER)
    write(writer, b"".join(answer.send(event) or b"" for event in refusal_events(refusal)))
    writer.write_eof()
    room = _LINGER_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while room > 0 and (data := await reader.read(CHUNK)):
                room -= len(data)
