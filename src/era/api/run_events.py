"""The events of a run, as they are sent: the same live, afterwards and after a restart."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from era.api.event_stream import Event
from era.core import jsontext
from era.core.event_log import Gap
from era.core.meter import turn
from era.core.run_messages import RunEvent, RunResult, RunStarted
from era.wire.base import text
from era.wire.runs import result_answer


async def run_events(
    events: AsyncIterator[RunEvent | Gap],
    *,
    with_data: bool = True,
    outcome: Callable[[RunResult], dict[str, Any]] = result_answer,
) -> AsyncGenerator[Event | Gap]:
    """Yield events `stdout` and `stderr`, those of a cell, and `done`, which `outcome` makes. A RunStarted is none: the
    headers say it."""
    async for event in events:
        if isinstance(event, RunStarted):
            continue
        if isinstance(event, Gap):
            yield event
        elif isinstance(event, RunResult):
            result = event if with_data else replace(event, data=None)
            yield Event(event.pieces + 1, "done", outcome(result))
        else:
            if event.stream == "event":
                fields = await jsontext.stored(event.data.decode())
                yield Event(event.number, str(fields.pop("type")), fields)
            else:
                yield Event(event.number, event.stream, {"content": text(event.data)})
            await turn()


async def closing_run_events(
    events: AsyncGenerator[RunEvent], outcome: Callable[[RunResult], dict[str, Any]]
) -> AsyncGenerator[Event | Gap]:
    """The same of events that nobody else takes: their source is closed as soon as these are."""
    async with aclosing(events):
        async for event in run_events(events, outcome=outcome):
            yield event
