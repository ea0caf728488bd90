"""The host's side of the helper that reads and changes a live session's files, its state file too
(guest/live_files.py).

What it answers is input from the sandbox: its form is checked, its size bounded, and it has limited time. One that
fails any of this is ended, and the next call gets another one. All callers share it, so it isn't ended for being slow.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from itertools import count
from typing import Any

from era.core.concurrency.meter import turn
from era.core.concurrency.stall_timeout import stall_timeout
from era.core.jsontext import MAX_STATE_BYTES
from era.core.ports import GuestProcess
from era.core.process import ProcessOutput, ProcessSpec
from era.core.trees.edits import FileEntry, display_path, in_the_way, no_file
from era.core.trees.paths import Parts
from era.errors import BadRequest, CommitFailed, Conflict, EraError, TooBusy, TooLarge, Unavailable

HELPER = ProcessSpec((), {}, channel=True, module="live_files")
PIECE = 1 << 18
"""Bytes of a file in one request or answer."""

_SECONDS = 30.0
"""How long an answer is waited for while the sandbox uses no processor."""

_MOST_SECONDS = 90.0
"""And in all: programs beside the helper may use some for ever, and changes have the session's turn meanwhile."""

_MOST_BYTES = 16 << 20
_MOST_HEAD = 64 << 10
"""Bytes of the head of an answer, which is parsed in the event loop. The longest has the target of a link, of 4 KiB:
each of these bytes may take 6 in JSON."""

_KINDS = ("file", "link", "dir", "other")
_CHANGES = ("put", "place", "delete", "mkdir", "move")
"""Requests that change the session's files, rather than read them or write to one that is yet to be put in place."""


class FileHelper:
    """One helper, in one sandbox."""

    def __init__(self, process: GuestProcess, cpu_seconds: Callable[[], float]) -> None:
        """`process` is one of HELPER. `cpu_seconds` is how much processor time the sandbox has used."""
        self._process = process
        self._cpu_seconds = cpu_seconds
        self._numbers = count(1)
        self._waiting: dict[int, asyncio.Future[tuple[Mapping[str, Any], bytes]]] = {}
        self._sending = asyncio.Lock()
        self._following = asyncio.create_task(self._follow())

    @property
    def alive(self) -> bool:
        return not self._following.done()

    async def end(self) -> None:
        await self._process.kill()
        await asyncio.wait([self._following])

    async def call(
        self, op: str, path: Parts = (), body: bytes = b"", /, **arguments: Any
    ) -> tuple[Mapping[str, Any], bytes]:
        """One request. `path` is the one that an error is about. Raises EraError."""
        number = next(self._numbers)
        answer: asyncio.Future[tuple[Mapping[str, Any], bytes]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        head = {"id": number, "op": op, **arguments}
        try:
            if not self.alive:
                raise gone()
            async with stall_timeout(self._cpu_seconds, _SECONDS, _MOST_SECONDS):
                await asyncio.shield(asyncio.create_task(self._send(head, body)))  # as a whole, whoever gives up
                found, content = await answer
        except (TimeoutError, BrokenPipeError):
            await self.end()
            raise gone(op in _CHANGES) from None
        finally:
            self._waiting.pop(number, None)
        if "error" in found:
            raise error_of(found["error"], path)
        return found, content

    async def _send(self, head: Mapping[str, Any], body: bytes) -> None:
        async with self._sending:
            await self._process.send(framed(head, body))

    async def _follow(self) -> None:
        """Give answers to who waits for them, until the helper ends or says what can't be."""
        buffer = bytearray()
        try:
            async for event in self._process.events():
                if not isinstance(event, ProcessOutput):
                    break
                if event.stream != "channel":
                    continue
                buffer += event.data
                while (answer := _taken(buffer)) is not None:
                    waiting = self._waiting.get(answer[0].get("id", 0))
                    if waiting is not None and not waiting.done():
                        waiting.set_result(answer)
                    await turn()  # thousands may have come in one piece
                await turn()
        except (ValueError, RecursionError):
            await self._process.kill()
        finally:
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(BrokenPipeError())


type OpenedHelper = Callable[[], Awaitable[FileHelper]]
"""Returns the helper of a live session, another one where the last was ended; see LiveSession.files."""


async def write_state(helper: OpenedHelper, content: bytes) -> None:
    """Put this in the place of the state file. Raises CommitFailed, or as `helper` does."""
    found, _ = await _ask_of_state(helper, "write_state", content)
    if (problem := found.get("problem")) is not None:
        raise CommitFailed(f"The session's state file {problem}.")


async def read_state(helper: OpenedHelper) -> tuple[bytes | None, str | None]:
    """Return the state file's content, and a problem with it.

    The content is None where there is no such file, and where it can't be used. Only then there is a problem, which
    completes the sentence "The state file …". Raises as `helper` does."""
    found, content = await _ask_of_state(helper, "read_state", limit=MAX_STATE_BYTES)
    if (problem := found.get("problem")) is not None:
        return None, str(problem)
    return (None if found.get("missing") else content[:MAX_STATE_BYTES]), None


async def _ask_of_state(
    helper: OpenedHelper, op: str, body: bytes = b"", **arguments: int
) -> tuple[Mapping[str, Any], bytes]:
    """Ask a helper, and once more another one where the session's programs have killed or stopped this one."""
    for _ in range(2):
        try:
            return await (await helper()).call(op, (), body, **arguments)
        except Unavailable as error:
            if error.code != "no_live_files":
                raise
    return {"problem": "can't be reached: what reads and writes it in the sandbox doesn't answer"}, b""


def framed(head: Mapping[str, Any], body: bytes = b"") -> bytes:
    """A request as it is sent."""
    text = json.dumps(head).encode()
    return len(text).to_bytes(4, "big") + len(body).to_bytes(4, "big") + text + body


def entry_of(path: Parts, found: Mapping[str, Any]) -> FileEntry:
    """An entry as the helper describes it. Raises Unavailable for what it can't be."""
    kind, link, etag = found.get("type"), found.get("link"), found.get("etag")
    size, mode, mtime_ns = (number_of(found, name) for name in ("size", "mode", "mtime_ns"))
    if kind not in _KINDS or not 0 <= size < 1 << 63 or mode < 0 or not isinstance(link, str | None):
        raise gone()
    if etag is not None and not (isinstance(etag, str) and re.fullmatch("[0-9a-f]{64}", etag)):
        raise gone()
    try:
        f"{'/'.join(path)}{link or ''}".encode(errors="surrogateescape")
    except UnicodeEncodeError:
        raise gone() from None
    is_link = kind == "link"
    return FileEntry(
        "/".join(path),
        kind,
        size,
        mtime_ns,
        None if is_link else mode & 0o777,
        (link or "")[:4096] if is_link else None,
        digest=etag,
    )


def number_of(found: Mapping[str, Any], name: str) -> int:
    """A number in an answer. Raises Unavailable where there is none."""
    number = found.get(name)
    if not isinstance(number, int) or isinstance(number, bool) or not -1 << 80 < number < 1 << 80:
        raise gone()
    return number


def _taken(buffer: bytearray) -> tuple[Mapping[str, Any], bytes] | None:
    """The next answer, which is taken out of the buffer; None where it isn't all there. Raises ValueError for what
    isn't one."""
    if len(buffer) < 8:
        return None
    head, body = int.from_bytes(buffer[:4], "big"), int.from_bytes(buffer[4:8], "big")
    if head > _MOST_HEAD or head + body > _MOST_BYTES:
        raise ValueError("an answer is too large")
    if len(buffer) < 8 + head + body:
        return None
    found = json.loads(bytes(buffer[8 : 8 + head]))
    if not isinstance(found, dict) or not isinstance(found.get("id"), int):
        raise ValueError("an answer has no form")
    content = bytes(buffer[8 + head : 8 + head + body])
    del buffer[: 8 + head + body]
    return found, content


def gone(may_have_changed: bool = False) -> Unavailable:
    """The error for a helper that is gone. `may_have_changed`: nobody knows whether it has done what it was to do."""
    what = "What reads and changes the files of this live session was ended, or didn't answer"
    if not may_have_changed:
        hint = "Send it again: another one is started. Processes of the session may be in its way."
        return Unavailable(f"{what}.", hint=hint, code="no_live_files")
    hint = "Look whether it was made before you send it again. Processes of the session may be in the helper's way."
    error = Unavailable(f"{what}: whether the change was made is not known.", hint=hint, code="no_live_files")
    error.retry_after = None  # or clients would send it again by themselves
    return error


def error_of(word: object, path: Parts) -> EraError:
    """The error for the word that a request failed with."""
    match word:
        case "ENOENT":
            return no_file(path)
        case "file" | "dir" | "link" | "other":
            return in_the_way(str(word), path)
        case "ENOTDIR" | "ELOOP" | "EEXIST" | "ENOTEMPTY" | "EISDIR":
            return Conflict(
                f"'{display_path(path)}' is not what it was a moment ago.",
                hint="A process of the session has changed it meanwhile. Look at it and try again.",
                code="changed",
            )
        case "exists":
            return Conflict(
                f"There is something at '{display_path(path)}' already.",
                hint='Delete it first, or send "replace": true, which replaces files and links.',
                code="exists",
            )
        case "EACCES" | "EPERM" | "EROFS":
            return Conflict(
                f"The session's programs may not do that with '{display_path(path)}'.",
                hint="Its permissions, or those of its directory, don't allow it.",
                code="no_permission",
            )
        case "ENOSPC" | "EDQUOT" | "EFBIG":
            return TooLarge("There is no room for this file.", hint="Delete something first.")
        case "busy":
            return TooBusy("As many files of this live session as may be are being read or written already.")
        case "EINVAL" | "ENAMETOOLONG" | "path":
            return BadRequest(f"'{display_path(path)}' can't be a path here.", code="bad_path")
        case _:
            return gone()
