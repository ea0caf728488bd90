"""Calls to a server's API. httpx is imported when the first call is made, so that `era --help` needn't wait for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from era.client.failure import Failure

if TYPE_CHECKING:
    import httpx

_CONNECT_SECONDS = 10.0


@contextmanager
def connect(server: str) -> Iterator[httpx.Client]:
    """A client of the server at this URL, which sends the key in ERA_API_KEY if there is one.

    Raises
    ------
    Failure
        No server answers, or it hangs up before its answer is complete.
    """
    import httpx

    key = os.environ.get("ERA_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # A run may take as long as it was allowed to; only connecting has a bound.
    timeout = httpx.Timeout(None, connect=_CONNECT_SECONDS)
    # Reading the certificates takes longer than most calls, and plain HTTP needs none: redirects aren't followed.
    verify = not server.startswith("http://")
    try:
        with httpx.Client(base_url=server, headers=headers, timeout=timeout, trust_env=False, verify=verify) as client:
            yield client
    except httpx.ConnectError as error:
        raise Failure(f"No server answers at {error.request.url}\n     Start one with `era serve`.") from None
    except httpx.TransportError as error:
        raise Failure(f"The server hung up: {error}") from None


def call(client: httpx.Client, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Send a JSON body and return the JSON answer. Raises Failure with the server's message if it is an error."""
    return checked(client.request(method, path, json=body))


def checked(response: httpx.Response) -> dict[str, Any]:
    """The JSON object in a response. Raises Failure if the response is an error, or no JSON."""
    try:
        answer: dict[str, Any] = response.json()
    except ValueError:
        raise Failure(f"{response.url} answers {response.status_code}, and not as an ERA server.") from None
    if response.is_error:
        raise Failure(f"{answer.get('error', response.status_code)}\n     {answer.get('hint', '')}".rstrip())
    return answer


@contextmanager
def stream(client: httpx.Client, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
    """A response whose body is still to be read; `options` are httpx's. Raises Failure if it isn't a 200."""
    with client.stream(method, path, **options) as response:
        if response.status_code != 200:
            response.read()
            checked(response)
        yield response
