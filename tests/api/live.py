"""Processes, terminals and WebSockets over HTTP, as tests use them."""

from __future__ import annotations

import json
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx

from tests.api.event_streams import numbered
from tests.api.websocket import WebSocket
from tests.conftest import Server, eventually

PATIENCE = 120.0
"""Seconds for which a terminal is waited for."""


def start(client: httpx.Client, where: str, command: str | list[str], **fields: Any) -> str:
    """Start a process; returns its id."""
    answer = client.post(f"/api/sessions/{where}/processes", json={"command": command, **fields})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["process_id"])


def process(client: httpx.Client, where: str, name: str) -> dict[str, Any]:
    answer = client.get(f"/api/sessions/{where}/processes/{name}")
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def ended(client: httpx.Client, where: str, name: str) -> dict[str, Any]:
    """The record of a process, once it has ended."""
    assert eventually(lambda: process(client, where, name)["status"] != "running")
    return process(client, where, name)


def events(client: httpx.Client, where: str, name: str, **query: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The events of a process with their numbers, as they come."""
    with client.stream("GET", f"/api/sessions/{where}/processes/{name}/events", params=query) as answer:
        assert answer.status_code == 200, answer.read()
        for number, _, data in numbered(answer):
            assert number is not None, data
            yield number, data


def content(event: dict[str, Any]) -> bytes:
    text = event["content"]
    return b64decode(text) if event["encoding"] == "base64" else text.encode()


def output(client: httpx.Client, where: str, name: str, **query: Any) -> bytes:
    """All that a process has written, once it has ended."""
    return b"".join(content(event) for _, event in events(client, where, name, **query) if "content" in event)


@contextmanager
def socket(server: Server, path: str, *headers: str) -> Iterator[WebSocket]:
    """A WebSocket to this path below /api/sessions, which the server has answered."""
    opened = WebSocket(server, f"/api/sessions/{path}", *headers)
    try:
        yield opened
    finally:
        opened.socket.close()


def refusal(server: Server, path: str, *headers: str) -> tuple[int, str]:
    """The status and code with which a WebSocket is refused; 101 where it isn't."""
    with socket(server, path, *headers) as opened:
        status = int(opened.head.split()[1])
        if status == 101:
            assert opened.accepted
            return 101, ""
        return status, json.loads(opened.refused())["code"]


class Terminal:
    """The client of a WebSocket to a terminal: what has come, and events by their type."""

    def __init__(self, opened: WebSocket) -> None:
        assert opened.accepted, opened.head
        self.connection = opened
        self.shown = b""
        self.events: list[dict[str, Any]] = []
        self.code: int | None = None
        """That with which the server has closed."""

    def send(self, text: str | bytes) -> None:
        self.connection.send(text.encode() if isinstance(text, str) else text)

    def control(self, **fields: Any) -> None:
        self.connection.send(json.dumps(fields).encode(), opcode=1)

    def take(self, deadline: float | None = None) -> None:
        """Take a message. Fails behind `deadline` (monotonic), since pings come without end."""
        assert deadline is None or time.monotonic() < deadline, (self.shown, self.events)
        opcode, payload = self.connection.receive()
        if opcode == 2:
            self.shown += payload
        elif opcode == 1:
            self.events.append(json.loads(payload))
        elif opcode == 9:
            self.connection.send(payload, opcode=10)
        elif opcode == 8:
            self.code = int.from_bytes(payload[:2], "big")
            with suppress(ConnectionError):  # it may not wait for that
                self.connection.send(payload, opcode=8)

    def until(self, text: str, count: int = 1) -> None:
        """Take messages until the terminal has shown this so many times."""
        deadline = time.monotonic() + PATIENCE
        while self.shown.count(text.encode()) < count:
            assert self.code is None, self.shown
            self.take(deadline)

    def until_event(self, kind: str) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while not (found := [event for event in self.events if event["type"] == kind]):
            assert self.code is None, self.shown
            self.take(deadline)
        return found[-1]

    def until_closed(self) -> int | None:
        """Take all that comes until the server closes; the code with which it does."""
        deadline = time.monotonic() + PATIENCE
        while self.code is None:
            self.take(deadline)
        return self.code
