"""The log: lines on stderr, for people or as JSON, and the line that each note becomes.

A line's `event` says what happened, and its fields to whom. `request` is in every line that a request brought about.
Tracebacks come without the values of variables: those are code, data and variables of users.
"""

from __future__ import annotations

import io
import json
import logging
import os
import select
import stat
import sys
from contextlib import suppress
from typing import Any, Literal, TextIO

import structlog

from era.core.telemetry import (
    DeliveryEnded,
    Event,
    GarbageCollected,
    NoticeTried,
    RequestEnded,
    RunEnded,
    SandboxAcquired,
    SandboxClosed,
    SandboxStarted,
    SetupEnded,
    origin,
)

log = structlog.get_logger()

_ASKED_ALL_THE_TIME = frozenset({"/health", "/ready", "/metrics"})
"""Requests for these are logged at the level `debug`, unless they begin to fail, or fail no longer."""

_failing: dict[str, str] = {}
"""By route of these, the code of the error that was the last answer."""

_ROOM_MS = 50
"""For which a line waits for whoever reads the log, unless the one before has waited in vain."""

_LOGGED = "_era_logged"
"""An attribute of an exception whose traceback is in the log already."""


def log_from(level: str, form: Literal["console", "json"] = "console") -> None:
    """Log on stderr, from this level up: lines for people, or a JSON object each. What libraries log through `logging`
    comes in the same form, from warnings up."""
    render: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)]
        if form == "console"
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_as_json)]
    )
    before: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        _with_request,
        structlog.processors.TimeStamper("iso", utc=True),
    ]
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*before, *render],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(_Unfailing(sys.stderr)),  # type: ignore[arg-type]  # all that it is used for
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=before, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render]
    )
    handler = logging.StreamHandler(_Unfailing(sys.stderr))
    handler.setFormatter(formatter)
    handler.addFilter(_is_news)
    logging.basicConfig(handlers=[handler], level=max(number, logging.WARNING), force=True)


class _Unfailing(io.TextIOBase):
    """A stream to which writing never fails, nor waits for long: no run may fail because the log is on a full disk, and
    no host miss its heartbeats because nobody reads it. What a pipe or terminal has no room for is left out."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._room: select.poll | None = None
        """Tells whether there is room, where the stream isn't a file."""

        with suppress(OSError):
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                self._room = select.poll()
                self._room.register(stream, select.POLLOUT)
        self._is_read = True
        """Whether there was room the last time."""

        self._is_within_line = False

    def write(self, text: str) -> int:
        with suppress(OSError):
            if self._room is None:
                self._stream.write(text)
            else:
                self._write_where_there_is_room(self._room, text.encode(errors="backslashreplace"))
        return len(text)

    def _write_where_there_is_room(self, room: select.poll, line: bytes) -> None:
        """Write in pieces of which each fits where there is any room."""
        if self._is_within_line:
            line = b"\n" + line
        for start in range(0, len(line), select.PIPE_BUF):
            self._is_read = bool(room.poll(_ROOM_MS if self._is_read else 0))
            if not self._is_read:
                return
            os.write(self._stream.fileno(), piece := line[start : start + select.PIPE_BUF])
            self._is_within_line = not piece.endswith(b"\n")

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def close(self) -> None:
        """Nothing: the stream is others', and each line is flushed. The interpreter closes what it takes apart, when
        names of modules such as this one's may be gone."""


_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=repr)


def _as_json(fields: dict[str, Any], **_options: Any) -> str:
    return _JSON.encode(fields)


def _with_request(_logger: Any, _method: str, fields: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Add the request's id, where there is one. A line that says None itself belongs to none."""
    if "request" not in fields:
        if (request := origin.get()) is not None and request.request_id:
            fields["request"] = request.request_id
    elif fields["request"] is None:
        del fields["request"]
    return fields


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record of a library's tells more than that an exception went by which we have logged."""
    error = record.exc_info[1] if record.exc_info else None
    return not getattr(error, _LOGGED, False)


def write(event: Event) -> None:
    """The `Note` that writes the log."""
    match event:
        case RequestEnded():
            _request(event)
        case RunEnded():
            _run(event)
        case SandboxStarted() if event.message is None:
            fields = {"sandbox": event.sandbox_id, "language": event.language, "isolation": event.isolation}
            log.info("sandbox_started", request=None, use=event.use, ms=_ms(event.seconds), **fields)
        case SandboxStarted():
            log.warning("sandbox_not_started", language=event.language, use=event.use, error=event.message)
        case SandboxClosed():
            session = {"session": event.session_id, "owner": event.owner} if event.session_id else {}
            log.info("sandbox_closed", request=None, sandbox=event.sandbox_id, reason=event.reason, **session)
        case SandboxAcquired():
            pass  # the run's line has how long that took
        case SetupEnded():
            fields = {"session": event.session_id, "owner": event.owner, "outcome": event.outcome}
            counts = {"ms": _ms(event.seconds), "packages": event.packages, "commands": event.commands}
            if event.message is None:
                log.info("setup", **fields, **counts)
            else:
                log.warning("setup", **fields, error=event.message)
        case DeliveryEnded():
            fields = {"session": event.session_id, "owner": event.owner, "delivery": event.delivery_id}
            outcome = {"outcome": event.outcome, "attempts": event.attempts, "answer": event.answer}
            log.info("delivery", **fields, run=event.run_id, **outcome, lag_ms=_ms(event.lag_seconds))
        case NoticeTried():
            fields = {"webhook": event.webhook_id, "owner": event.owner, "notice": event.notice_id}
            outcome = {
                "event_told": event.event,
                "outcome": event.outcome,
                "tries": event.tries,
                "answer": event.answer,
            }
            write_line = log.warning if event.outcome == "failed" else log.info
            write_line("webhook", **fields, **outcome, ms=_ms(event.seconds), lag_ms=_ms(event.lag_seconds))
        case GarbageCollected() if event.message is None:
            log.info("garbage_collected", blobs=event.blobs, ms=_ms(event.seconds))
        case GarbageCollected(put_off=True):
            log.info("garbage_put_off", reason=event.message)
        case GarbageCollected():
            log.warning("garbage_not_collected", error=event.message)


def _request(event: RequestEnded) -> None:
    fields: dict[str, Any] = {
        "request": event.request_id,
        "method": event.method,
        "route": event.route,
        "status": event.status,
        "ms": _ms(event.seconds),
    }
    more = {
        "owner": event.owner,
        "key": event.key_id,
        "session": event.session_id,
        "code": event.code,
        "error": event.message,
        "trace": event.trace.trace_id if event.trace else None,
    }
    fields |= {name: value for name, value in more.items() if value}
    if event.failure is not None:
        _mark(event.failure)
        log.error("request_failed", **fields, exc_info=event.failure)
    elif event.route in _ASKED_ALL_THE_TIME and not _is_other(event):
        log.debug("request", **fields)
    elif event.status >= 500 and event.code:  # or it is the answer of a session's own server
        log.error("request_failed", **fields)
    else:
        log.info("request", **fields)


def _is_other(event: RequestEnded) -> bool:
    """Whether a request for what is asked all the time fails though the one before didn't, or for another reason, or
    the other way round."""
    code = event.code if event.status >= 500 else None
    before = _failing.pop(event.route, None)
    if code:
        _failing[event.route] = code
    return code != before


def _mark(error: BaseException) -> None:
    """Remember that this exception's traceback is in the log."""
    try:
        setattr(error, _LOGGED, True)
    except AttributeError:  # it has slots: then a library may log it once more
        return


def _run(event: RunEnded) -> None:
    fields: dict[str, Any] = {
        "run": event.run_id,
        "session": event.session_id,
        "owner": event.owner,
        "kind": event.kind,
        "language": event.language,
        "outcome": event.outcome,
        "ms": _ms(event.stages.total),
    }
    fields |= {f"{stage}_ms": _ms(seconds) for stage, seconds in event.stages.seconds.items()}
    more = {
        "sandbox": event.sandbox_id,
        "exit_code": event.exit_code,
        "committed": event.committed,
        "code": event.code,  # what it means is said once, by who gets the error
        "trace": event.trace.trace_id if event.trace else None,
    }
    fields |= {name: value for name, value in more.items() if value is not None}
    log.info("run", **fields)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)
