"""Calls of the files API: put, get, delete and list the files of a session."""

from __future__ import annotations

import http.client
from contextlib import closing
from typing import Any

import httpx

from era.wire.files import FilesAnswer
from tests.api.answers import checked

LIST_KEYS = {"files", "count", "total_count", "total_size_bytes", "next_cursor"}
MIB = 1 << 20


def put(client: httpx.Client, where: str, path: str, content: Any = b"", **headers: str) -> httpx.Response:
    return client.put(f"/api/sessions/{where}/files/{path}", content=content, headers=headers)


def get(client: httpx.Client, where: str, path: str, **headers: str) -> httpx.Response:
    return client.get(f"/api/sessions/{where}/files/{path}", headers=headers)


def delete(client: httpx.Client, where: str, path: str, **headers: str) -> httpx.Response:
    return client.delete(f"/api/sessions/{where}/files/{path}", headers=headers)


def listed(client: httpx.Client, where: str, **which: Any) -> dict[str, Any]:
    """A page of the list of files."""
    return checked(client.get(f"/api/sessions/{where}/files", params=which), FilesAnswer, LIST_KEYS)


def names(client: httpx.Client, where: str, **which: Any) -> list[str]:
    """The paths of a page of the list of files."""
    return [file["path"] for file in listed(client, where, **which)["files"]]


def raw(client: httpx.Client, method: str, path: bytes) -> httpx.Response:
    """Send a request whose path goes out as it is; httpx would normalise it."""
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port or 80, timeout=60)
    with closing(connection):
        connection.request(method, path.decode("latin-1"))
        answer = connection.getresponse()
        return httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())
