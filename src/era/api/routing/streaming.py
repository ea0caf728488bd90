"""Answers that are longer than memory should hold: sent piece by piece, from content that is closed afterwards, or the
range of it that was asked for."""

from __future__ import annotations

import asyncio
import codecs
import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from era.api.protocol.answers import Answer, json_bytes
from era.api.routing.context import cursor_of
from era.core.concurrency.meter import turn
from era.core.concurrency.tasks import to_its_end
from era.core.execution.run_messages import Collected, RunResult
from era.core.execution.spooled_output import SpooledOutput
from era.core.models import Snapshot
from era.core.trees.edits import FileEntry
from era.errors import EraError, RangeNotSatisfiable, TooLarge, Unavailable
from era.wire.files import files_answer

MOST_FILES = 10_000
"""Files in the list of one answer that has no pages. A million of them are 200 MB."""

_SMALL = 64 << 10
"""Bytes of output up to which an answer is made in one piece."""


class PlainStreaming(StreamingResponse):
    """Streams pieces in a task that is cancelled once where the caller hangs up, and has ended before this does.

    Starlette would cancel it again in every iteration of the event loop. A piece that can't be cut short, as one on a
    thread, would keep a processor busy for as long as it takes, and nothing that waits could be closed.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self.stream_response(send))
        gone = asyncio.create_task(self.listen_for_disconnect(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            sending.cancel()
            gone.cancel()
            await to_its_end(asyncio.wait((sending, gone)))
            failures = [task.exception() for task in (sending, gone) if not task.cancelled()]
        for failure in failures:
            if failure is not None:
                raise failure
        if self.background is not None:
            await self.background()


class ClosingResponse(PlainStreaming):
    """Streams `pieces` and calls `close` afterwards, also where sending never began.

    Where `pieces` raises an EraError or an OSError once sending has begun, the connection is reset, so that nobody
    takes what came for all of it; the error is that of the request's record.
    """

    def __init__(self, pieces: AsyncIterator[bytes], close: Callable[[], None] = lambda: None, **options: Any) -> None:
        super().__init__(_read(pieces), **options)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = False

        async def send_noted(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            await super().__call__(scope, receive, send_noted)
        except EraError as error:
            if not began:
                raise
            scope["state"] |= {"refusal": (error.code, error.message), "broke_off": error.status}
            await scope["extensions"]["era.connection"].cut()
        finally:
            self._close()


async def _read(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """`pieces`. Raises Unavailable where the disk or the bucket that they are read from fails."""
    try:
        async for piece in pieces:
            yield piece
    except OSError as error:
        raise Unavailable(f"What is sent could not be read: {error.strerror}.") from error


async def listing_response(pieces: AsyncIterator[bytes]) -> Response:
    """A JSON answer that may be a long list: in one piece if it is small, else as its pieces come."""
    first = bytearray()
    async for piece in pieces:
        first += piece
        if len(first) > _SMALL:
            return ClosingResponse(_and_on(bytes(first), pieces), media_type=Answer.media_type)
    return Response(bytes(first), media_type=Answer.media_type)


async def _and_on(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


def check_file_count(snapshot: Snapshot, list_path: str) -> None:
    """Raise TooLarge for a snapshot with more files than one answer lists; `list_path` lists them in pages."""
    if snapshot.file_count > MOST_FILES:
        raise TooLarge(
            f"There are {snapshot.file_count} files, more than the {MOST_FILES} that one answer lists.",
            hint=f"GET {list_path} lists them in pages; leave out include=files.",
        )


async def with_files(answer: dict[str, Any], pages: AsyncIterator[Sequence[FileEntry]]) -> AsyncIterator[bytes]:
    """The pieces of an answer that has the list of these files as its last field, `files`."""
    yield json_bytes(answer)[:-1] + b',"files":['
    async for piece in in_one_list(files_answer(page) async for page in pages):
        yield piece
    yield b"]}"


async def in_one_list(pages: AsyncIterator[list[dict[str, Any]]]) -> AsyncIterator[bytes]:
    """What stands between the brackets of a list of JSON that comes some values at a time."""
    before = b""
    async for page in pages:
        yield before + json_bytes(page)[1:-1]
        before = b","
        await turn()


async def page_pieces[T](
    name: str, items: Iterable[T], shown: Callable[[T], Mapping[str, Any]], rest: Mapping[str, Any]
) -> AsyncIterator[bytes]:
    """The pieces of an answer that has a list of items and then `rest`, the same bytes as if it had been made in one
    piece. A page has a bound for how many they are, and each may be large: so they are made one by one, between which
    others have their turn."""
    piece, before = bytearray(b'{"%b":[' % name.encode()), b""
    for item in items:
        text = json_bytes(shown(item))
        piece += before + text
        before = b","
        if len(piece) >= _SMALL:
            yield bytes(piece)
            piece.clear()
        await turn()
    yield bytes(piece) + b"]," + json_bytes(rest)[1:]


async def paged_response[T](
    name: str,
    rows: Sequence[T],
    limit: int,
    shown: Callable[[T], Mapping[str, Any]],
    key: Callable[[T], int],
) -> Response:
    """A page of at most `limit` rows. One more is given if there is a next page, which begins behind the `key` of the
    last row shown."""
    page = rows[:limit]
    following = cursor_of(str(key(page[-1]))) if len(rows) > limit else None
    return await listing_response(page_pieces(name, page, shown, {"count": len(page), "next_cursor": following}))


async def run_response(
    run: Collected, shown: Callable[[RunResult, bytes, bytes], dict[str, Any]], headers: Mapping[str, str] | None = None
) -> Response:
    """The JSON answer of a run, which this closes. `shown` makes it from the run's result, stdout and stderr, which
    come first in it."""
    if run.stdout.size + run.stderr.size > _SMALL:
        rest = Answer(shown(run.result, b"", b"")).body
        return ClosingResponse(_json(run, bytes(rest)), run.close, media_type="application/json", headers=headers)
    with closing(run):
        answer = shown(run.result, await run.stdout.whole(), await run.stderr.whole())
        return Answer(answer, headers=dict(headers or {}))


async def _json(run: Collected, without_output: bytes) -> AsyncIterator[bytes]:
    """The same bytes as if the answer had been made in one piece. `without_output` is that of a run without any."""
    at = 0
    for written in (run.stdout, run.stderr):
        end = without_output.index(b'""', at) + 1
        yield without_output[at:end]
        at = end
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        async for piece in written.pieces(0, written.size):
            yield _escaped(decoder.decode(piece))
            await turn()
        yield _escaped(decoder.decode(b"", final=True))
    yield without_output[at:]


def _escaped(text: str) -> bytes:
    return json.dumps(text, ensure_ascii=False)[1:-1].encode()


async def ranged_response(
    request: Request, content: SpooledOutput, media_type: str, headers: dict[str, str]
) -> Response:
    """`content`, which this closes, as a 200, or the range of it that the request asks for as a 206."""
    headers = {"Accept-Ranges": "bytes", **headers}
    try:
        part = requested_range(request.headers.get("range"), content.size)
    except BaseException:
        content.close()
        raise
    start, end = part or (0, content.size)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{content.size}"
    headers["Content-Length"] = str(end - start)
    status = 200 if part is None else 206
    return ClosingResponse(
        content.pieces(start, end), content.close, status_code=status, headers=headers, media_type=media_type
    )


_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


def requested_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The range that a Range header asks for, of a body of `size` bytes: its start and its end (exclusive).

    None means the whole body. As HTTP allows, so does a header that is invalid or asks for several ranges. Raises
    RangeNotSatisfiable for a range that begins beyond the end.
    """
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match[1], match[2]
    if not first:
        start, end = max(size - int(last), 0), size
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= size:
        raise RangeNotSatisfiable(f"'{header}' is not a part of {size} bytes.", size)
    return start, end
