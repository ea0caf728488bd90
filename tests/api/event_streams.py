"""Event streams, as a strict client reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx

type Numbered = tuple[int | None, str, dict[str, Any]]


def numbered(answer: httpx.Response) -> Iterator[Numbered]:
    """Number, name and data of each event, as they come. Comments are left out."""
    fields: dict[str, str] = {}
    for line in answer.iter_lines():
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            assert name in ("event", "data", "id")
            assert name not in fields
            fields[name] = value
        elif fields:
            data = json.loads(fields["data"])
            assert data["type"] == fields["event"]
            yield int(fields["id"]) if "id" in fields else None, fields["event"], data
            fields = {}


def event_data(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """The data of each event, as they come."""
    return (data for _, _, data in numbered(answer))


def followed(client: httpx.Client, path: str, **options: Any) -> list[Numbered]:
    """All events of a stream, whose numbers are consecutive but for what a gap says."""
    with client.stream("GET", path, **options) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        found = list(numbered(answer))
    last: int | None = None
    for number, name, data in found:
        if number is not None:
            first = data["from"] if name == "gap" else number
            assert last is None or first == last + 1, "no number is missing, and none comes twice"
            last = number
    return found
