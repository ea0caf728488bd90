"""The service's end of guest/state_file.py: the state file of a live session, written and read from inside."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from era.core.jsontext import MAX_STATE_BYTES
from era.core.ports import GuestProcess
from era.core.process import ProcessEnded, ProcessSpec
from era.core.stall_timeout import stall_timeout
from era.errors import CommitFailed

LIMIT = MAX_STATE_BYTES
"""Bytes of the state file that are read at all. What is kept is bounded in core/jsontext.py."""

SPEC = ProcessSpec((), {}, channel=True, module="state_file")

_SECONDS, _MOST_SECONDS = 10.0, 60.0
"""How long an answer of the helper's, its start included, is waited for while the sandbox uses no processor; and in
all, since programs beside it may use some for ever."""

_NO_ANSWER = b"can't be reached: what reads and writes it in the sandbox doesn't answer"
_MOST_BYTES = LIMIT + 5


class _Gone(Exception):
    """The helper has ended, or isn't what it was."""


class StateFile:
    """The state file of one live session. One call at a time."""

    def __init__(
        self, start: Callable[[ProcessSpec], Awaitable[GuestProcess]], cpu_seconds: Callable[[], float]
    ) -> None:
        """`start` starts the helper; `cpu_seconds` is how much processor time the sandbox has used."""
        self._start = start
        self._cpu_seconds = cpu_seconds
        self._process: GuestProcess | None = None
        self._answers: asyncio.Queue[tuple[bytes, bytes] | None] = asyncio.Queue()
        self._following: asyncio.Task[None] | None = None

    async def write(self, content: bytes) -> None:
        """Put this in its place. Raises CommitFailed, or as `start` does."""
        kind, payload = await self._ask(b"W", content)
        if kind == b"F":
            payload = b"can't be written: " + payload
        if kind != b"K":
            raise CommitFailed(f"The session's state file {payload.decode(errors='replace')}.")

    async def read(self) -> tuple[bytes | None, str | None]:
        """Its content, None where there is none or it can't be used; and in the latter case why, as the end of a
        sentence. Raises as `start` does."""
        kind, payload = await self._ask(b"R", str(LIMIT).encode())
        if kind == b"S":
            return payload, None
        return None, None if kind == b"M" else payload.decode(errors="replace")

    async def close(self) -> None:
        """End the helper."""
        process, self._process = self._process, None
        if process is not None:
            await process.kill()
        if self._following is not None:
            await asyncio.wait([self._following])

    async def _ask(self, kind: bytes, payload: bytes) -> tuple[bytes, bytes]:
        """Send a request and return its answer; once more to another helper where this one was killed or stopped by the
        session's programs. Where none answers, that is an answer of its own kind."""
        for _ in range(2):
            try:
                async with stall_timeout(self._cpu_seconds, _SECONDS, _MOST_SECONDS):
                    if self._process is None:
                        self._answers = asyncio.Queue()
                        self._process = await self._start(SPEC)
                        self._following = asyncio.create_task(_follow(self._process, self._answers))
                    await self._process.send(kind + len(payload).to_bytes(4, "big") + payload)
                    answer = await self._answers.get()
                if answer is not None:
                    return answer
            except (TimeoutError, BrokenPipeError):
                pass
            await self.close()
        return b"N", _NO_ANSWER


async def _follow(process: GuestProcess, answers: asyncio.Queue[tuple[bytes, bytes] | None]) -> None:
    """Put each answer into the queue, and None at the end."""
    received = bytearray()
    async for event in process.events():
        if isinstance(event, ProcessEnded):
            answers.put_nowait(None)
        elif event.stream == "channel":
            received += event.data
            size = int.from_bytes(received[1:5], "big")
            if len(received) >= 5 and len(received) >= 5 + size:
                answers.put_nowait((bytes(received[:1]), bytes(received[5 : 5 + size])))
                received.clear()
            if len(received) > _MOST_BYTES:
                await process.kill()
                received.clear()
