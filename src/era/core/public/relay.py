"""The relay, by which stored code answers requests, much as CGI does: the request becomes variables, the output a
response.

`environment` turns a request into a run's variables, `reply` turns a finished run into a response. Between the two lies
an ordinary run. Which headers pass is decided in headers.py.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from era.core import jsontext
from era.core.concurrency.fair_limiter import FairLimiter
from era.core.concurrency.tasks import computing
from era.core.execution.run_messages import Collected, RunResult
from era.core.execution.spooled_output import SpooledOutput
from era.core.models import Status
from era.core.public import headers
from era.errors import RelayFailed, RelayTimeout, TooLarge

MAX_BODY_BYTES = 128 << 10
"""No body larger than this fits a variable, in either encoding."""

_MAX_VARIABLE_BYTES = 128 << 10
"""Linux' bound for one string of an environment (MAX_ARG_STRLEN): name, `=`, value and a NUL."""

_LARGE = 1 << 20
"""Bytes from which on an answer is kept in a file, and read one at a time."""

_IN_THREAD = 64 << 10
"""Bytes from which on an answer is read in a thread, so that others go on meanwhile."""

_MAX_JSON = 16 << 20
_JSON_BEGINS = b'{["'
_one_large = FairLimiter(1)

_MAX_ANSWER_COMMAS = 500_000
"""Bounds how many values an answer has. JSON may be tens of MiB, and many small values take thirty times that in
memory."""

_NO_ANSWER: dict[Status, str] = {
    "oom": "ran out of memory",
    "killed": "was killed",
    "disk_full": "ran out of disk space",
}


@dataclass(frozen=True, slots=True)
class Call:
    """A request from outside. `path` and `query` are as received, still escaped, without the `?`; `headers` have
    lower-case names."""

    method: str
    path: bytes
    query: bytes
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """A response, without the headers that the server adds to all of its own."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes | SpooledOutput


def environment(call: Call, *, key: bytes | None, own_origin: bool = False) -> dict[str, str]:
    """The variables that describe a request to a program. `key` is the operator's API key, which no program may see;
    for `own_origin` see headers.Place.

    Raises TooLarge for what fits no environment.
    """
    path, query = ascii_target(call.path), ascii_target(call.query)
    return variables(call.method, path, query, headers.of_request(call.headers, key, own_origin=own_origin), call.body)


def variables(method: str, path: str, query: str, passed: Iterable[tuple[str, str]], body: bytes) -> dict[str, str]:
    """The same from parts: `path` and `query` as text, and the headers that a session may see. Raises TooLarge."""
    text, encoding = body_text(body)
    described = {
        "ERA_REQUEST_MODE": "proxy",
        "ERA_HTTP_METHOD": method,
        "ERA_HTTP_PATH": path or "/",
        "ERA_HTTP_QUERY": f"?{query}" if query else "",
        "ERA_HTTP_HEADERS": json.dumps(_joined(passed), ensure_ascii=False),
        "ERA_HTTP_BODY": text,
        "ERA_HTTP_BODY_ENCODING": encoding,
    }
    for name, value in described.items():
        if len(name) + len(value.encode()) + 2 > _MAX_VARIABLE_BYTES:
            raise too_large(name)
    return described


def too_large(variable: str) -> TooLarge:
    """The error for a request of which this variable would be too long."""
    return TooLarge(
        f"The request is too large for the program that answers it: {variable} would be over 128 KiB.",
        hint="A body may have about 128 KiB as UTF-8 text and 96 KiB as anything else. Upload larger things as files.",
    )


async def reply(run: Collected, place: headers.Place, owner: str) -> Reply:
    """The response that a run's output describes, for the place where the session of this owner answers.

    A JSON object may describe status, headers and body; other JSON is the body itself; anything else is sent as text.
    Raises RelayTimeout or RelayFailed where the run gave no answer, or none that can be sent.
    """
    result = run.result
    if result.status == "timeout":
        hint = "X-Era-Run names its run. A program that goes on as a server belongs into the session's 'service'."
        raise RelayTimeout("The program that answers this URL reached its timeout.", hint=hint)
    if why := _NO_ANSWER.get(result.status):
        raise RelayFailed(f"The program that answers this URL {why}.")
    if result.stdout_truncated:
        raise RelayFailed("What the program printed is over its limit of output, so it is no whole answer.")
    if run.stdout.size <= _LARGE:
        return await _described_by(result, await run.stdout.whole(), place, owner)
    is_json = await _begin_of(run.stdout) in _JSON_BEGINS
    if not is_json:
        return _text(result, run.stdout, place)
    if run.stdout.size > _MAX_JSON:
        raise RelayFailed(f"What the program printed looks like JSON and is over {_MAX_JSON >> 20} MiB.")
    async with _one_large.slot(owner, result.session_id):
        whole = await _described_by(result, await run.stdout.whole(), place, owner)
        body = run.stdout.another()
        await body.append(whole.body if isinstance(whole.body, bytes) else b"")
        return Reply(whole.status, whole.headers, body)


async def _begin_of(written: SpooledOutput) -> bytes:
    """The first byte that is no white space, none where there is none."""
    async for piece in written.pieces(0, written.size):
        if stripped := piece.lstrip():
            return stripped[:1]
    return b""


def _text(result: RunResult, body: bytes | SpooledOutput, place: headers.Place) -> Reply:
    """The response of a program that printed text."""
    status = 200 if result.exit_code == 0 else 500
    return Reply(status, _headers({}, "text/plain; charset=utf-8", place), body)


async def _described_by(result: RunResult, stdout: bytes, place: headers.Place, owner: str) -> Reply:
    """The response that this output describes. Raises RelayFailed."""
    if len(stdout) > _IN_THREAD:
        return await computing(owner, _read, result, stdout, place)
    return _read(result, stdout, place)


def _read(result: RunResult, stdout: bytes, place: headers.Place) -> Reply:
    """`_described_by`, at once."""
    printed = stdout.strip()
    if printed[:1] in (b"{", b"[") and printed.count(b",") > _MAX_ANSWER_COMMAS:
        raise RelayFailed("What the program printed is JSON of too many values.")
    try:
        value = jsontext.loads(printed)
    except jsontext.JsonProblem:
        return _text(result, stdout, place)
    if not isinstance(value, dict):
        return Reply(200, _headers({}, "application/json", place), printed)
    return _described(value, printed, place)


def _described(answer: dict[str, Any], printed: bytes, place: headers.Place) -> Reply:
    """The response that an object describes. Without a `body`, the object itself is the body."""
    status = answer.get("status")
    if not isinstance(status, int) or isinstance(status, bool):
        status = 200  # {"status": "ok"} is the answer itself and describes none
    elif not 200 <= status <= 599:
        raise RelayFailed(f"The program answered 'status' {str(status)[:20]}, which is not one from 200 to 599.")
    described, media_type = answer.get("headers", {}), answer.get("contentType")
    if not isinstance(described, dict):
        raise RelayFailed("The program answered 'headers' that are no object.")
    if media_type is not None and not isinstance(media_type, str):
        raise RelayFailed("The program answered a 'contentType' that is no string.")
    if media_type is not None:
        described = {**described, "content-type": media_type}  # the last one counts
    body = answer.get("body")
    if "body" not in answer:
        content, default = printed, "application/json"
    elif isinstance(body, str):
        content, default = body.encode(), "text/plain; charset=utf-8"
    else:
        try:
            text = jsontext.compact(body)
        except jsontext.JsonProblem as error:
            raise RelayFailed(f"The program answered a 'body' that {error}.") from None
        content, default = text.encode(), "application/json"
    if status in (204, 205, 304):
        content = b""
    return Reply(status, _headers(described, default, place), content)


def _headers(described: dict[str, Any], default_type: str, place: headers.Place) -> list[tuple[str, str]]:
    """The headers of a response, from the object that a program has printed. Raises RelayFailed."""
    return headers.of_answer([("content-type", default_type), *_pairs(described)], place)


def _pairs(described: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Headers as pairs of a name in lower case and a value; a list becomes several. Raises RelayFailed."""
    for name, values in described.items():
        if not headers.TOKEN.fullmatch(name):
            raise RelayFailed("The program answered a header with a name that no header can have.")
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise RelayFailed(f"The program answered a header '{name[:40]}' that is neither text nor a number.")
            text = str(value).strip(" \t")
            if not text.isascii():
                raise RelayFailed(
                    f"The program answered a header '{name[:40]}' with a character that can't be in one.",
                    hint="A header is one line of ASCII: no line breaks, no NUL.",
                )
            yield name.lower(), text


def _joined(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Headers by name. Values of a repeated header are joined, as RFC 9110 has it."""
    joined: dict[str, str] = {}
    for name, value in pairs:
        joined[name] = f"{joined[name]}{'; ' if name == 'cookie' else ', '}{value}" if name in joined else value
    return joined


def body_text(body: bytes) -> tuple[str, str]:
    """A body as text without NUL, and its encoding: `utf-8` or `base64`."""
    if b"\0" not in body:
        try:
            return body.decode(), "utf-8"
        except UnicodeDecodeError:
            pass
    return base64.b64encode(body).decode(), "base64"


def ascii_target(target: bytes) -> str:
    """A part of a request's target as text. Bytes that may not stand in one are percent-escaped."""
    return "".join(chr(byte) if 0x20 < byte < 0x7F else f"%{byte:02X}" for byte in target)
