# Made by scripts/blocking.py of src/era/sdk/aio/connection.py: change that one.
"""Requests to one server: sent, tried again where that is safe, and their errors raised."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from era.errors import EraError
from era.sdk.blocking import Answer, Transport, sleep
from era.sdk.calls import Call, Query, address, authorization
from era.sdk.errors import ConnectionLost, answered_error
from era.sdk.retries import Retries

DEFAULT_URL = "http://127.0.0.1:8787"

LONGEST_RUN = 86_400.0
"""Seconds that a run may take of which nothing is known."""

_PATIENCE = 60.0
"""Seconds for which the server lets a change of files wait for the run before it."""


class Connection:
    """What all parts of a client share."""

    def __init__(
        self, url: str | None, api_key: str | None, timeout: float, connect_timeout: float, retries: int, keys: bool
    ) -> None:
        self.url = address(url or os.environ.get("ERA_URL") or os.environ.get("ERA_SERVER") or DEFAULT_URL)
        self.timeout = timeout
        self.keys = keys
        """Whether runs and new sessions get an Idempotency-Key."""

        self.retries = retries
        self._is_known = False
        """Whether the server has answered before. If it can't be reached then, it may be restarting."""

        key = os.environ.get("ERA_API_KEY") if api_key is None else api_key
        self._transport = Transport(self.url, authorization(key), connect_timeout)

    @property
    def files_seconds(self) -> float:
        """How long the answer to a change of files may take: behind a run it comes after a minute, and says why."""
        return self.timeout + _PATIENCE

    @property
    def turn_seconds(self) -> float:
        """How long the answer to a call may take that waits for the end of the run before it, however long that is."""
        return self.timeout + LONGEST_RUN

    def open(self, call: Call) -> Answer:
        """The answer to a call, its body still to be read. Raises what the server answers, or why it doesn't."""
        try:
            return self._answer(call, self._retries(call))
        finally:
            call.close()

    def _answer(self, call: Call, retries: Retries) -> Answer:
        """The same for a call that may be made again as often as `retries` says, and that stays open."""
        while True:
            try:
                answer = self._transport.open(call, call.seconds or self.timeout)
                if 200 <= answer.status < 300:
                    self._is_known = True
                    return answer
                raise answered_error(answer.status, answer.headers, _json_or_none(answer))
            except EraError as error:
                seconds = retries.pause(error, is_known=self._is_known)
            sleep(seconds)

    def call(self, call: Call) -> Any:
        """The JSON of the answer to a call. Raises EraError."""
        retries = self._retries(call)
        try:
            while True:
                answer = self._answer(call, retries)
                try:
                    return answer.json()
                except ConnectionLost as error:
                    seconds = retries.pause(error, is_known=self._is_known)
                sleep(seconds)
        finally:
            call.close()

    def _retries(self, call: Call) -> Retries:
        return Retries(call, self.retries, call.seconds or self.timeout, self.timeout)

    def get(self, path: str, **query: Any) -> Any:
        return self.call(Call("GET", path, query=query))

    def send(self, method: str, path: str, json: object = None, seconds: float | None = None) -> Any:
        return self.call(Call(method, path, json=json, seconds=seconds))

    def pages(self, path: str, name: str, limit: int | None = None, query: Query | None = None) -> list[Any]:
        """All items of a list that the server answers in pages, or the first `limit` of them."""
        found: list[Any] = []
        cursor = None
        while limit is None or len(found) < limit:
            size = 1000 if limit is None else min(1000, limit - len(found))
            page = self.get(path, limit=size, cursor=cursor, **(query or {}))
            found += page[name]
            cursor = page.get("next_cursor", page.get("cursor"))
            if cursor is None:
                break
        return found

    def content(self, path: str, **query: Any) -> bytes:
        """The body of an answer that is no JSON."""
        return (self.open(Call("GET", path, query=query))).read()

    def pieces(self, call: Call) -> Iterator[bytes]:
        """The body of an answer as it comes."""
        answer = self.open(call)
        for piece in answer.pieces():
            yield piece

    def close(self) -> None:
        self._transport.close()


def _json_or_none(answer: Answer) -> Any:
    try:
        return answer.json()
    except EraError:
        return None
