"""Processes beside runs: the bodies that start and steer one, and how they and their output are shown."""

from __future__ import annotations

import json
import signal
from base64 import b64encode
from typing import Annotated, Any, Literal

from pydantic import BaseModel, FailFast, Field

from era.core.live.output_log import Exit, Piece
from era.core.models import timestamp
from era.core.process import ProcessRecord, ProcessStatus, TerminalSize
from era.wire.base import Body, ErrorEvent, GapEvent
from era.wire.runs import MAX_ARGS, Env, Secrets

TAG = r"^[A-Za-z0-9_.-]{1,64}$"

Size = Annotated[int, Field(ge=1, le=1000)]


class PtyBody(Body):
    cols: Size = Field(80, description="Characters in a row.")
    rows: Size = Field(24, description="Rows.")

    def size(self) -> TerminalSize:
        return TerminalSize(self.cols, self.rows)


class StartProcess(Body):
    command: str | Annotated[list[str], Field(max_length=MAX_ARGS), FailFast()] = Field(
        description="A program and its arguments, or a line for `sh -c`.", examples=["npm run dev", ["python3", "-i"]]
    )
    cwd: str = Field("", description="Directory to start in, below the working directory.", examples=["src"])
    env: Env = Field(default_factory=dict)
    secrets: Secrets = Field(default_factory=dict)
    stdin: bool = Field(False, description="Whether it takes input; else its standard input is empty.")
    pty: PtyBody | None = Field(None, description="A terminal of this size for it, which takes input in any case.")
    tag: str | None = Field(None, pattern=TAG, description="A name of yours, unique among processes that run.")
    timeout: float | None = Field(None, gt=0, description="Seconds until it is told to end; left out: none.")


class SignalBody(Body):
    signal: str | int = Field(description="A name, with or without SIG, or a number.", examples=["INT", 15])


class ResizeBody(Body):
    pty: PtyBody = Field(description="The new size of its terminal.")


class ProcessOutputEvent(BaseModel):
    """A piece of what a process wrote. No character of UTF-8 is cut in two."""

    type: Literal["stdout", "stderr", "pty"]
    content: str
    encoding: Literal["utf-8", "base64"]


class ExitEvent(BaseModel):
    """The last event of a process."""

    type: Literal["exit"]
    exit_code: int | None
    signal: str | None
    reason: str | None


ProcessEvent = Annotated[ProcessOutputEvent | ExitEvent | GapEvent | ErrorEvent, Field(discriminator="type")]


class ProcessAnswer(BaseModel):
    process_id: str
    tag: str | None
    command: str | list[str]
    status: ProcessStatus
    pid: int | None
    stdin: bool
    pty: bool
    started_at: str
    ended_at: str | None
    exit_code: int | None = Field(description="As a shell gives it: 128 + N for signal N, 124 for a timeout.")
    signal: str | None = Field(description="The signal that killed it.")
    reason: str | None = Field(description="Why it was ended, if not by itself.")
    output_bytes: int | None = Field(description="What it has written; null of one that was lost.")


class ProcessesAnswer(BaseModel):
    processes: list[ProcessAnswer]
    count: int


class InputAnswer(BaseModel):
    success: bool
    process_id: str
    bytes: int


class SteeredAnswer(BaseModel):
    success: bool
    process_id: str


class CheckpointAnswer(BaseModel):
    version: int = Field(description="The version that holds the files; the one in force where nothing has changed.")
    consistent: bool = Field(description="Whether all files are as they were at one moment.")


class TicketAnswer(BaseModel):
    ticket: str
    expires_at: str


def signal_number(wanted: str | int) -> int | None:
    """The number of a signal that is named as a shell or a person would, None for what names none."""
    if isinstance(wanted, str):
        name = wanted.strip().upper()
        if not name.isascii() or len(name) > 20:
            return None
        if not name.isdigit():
            try:
                return signal.Signals["SIG" + name.removeprefix("SIG")].value
            except KeyError:
                return None
        wanted = int(name)
    return wanted if 1 <= wanted < signal.NSIG else None


def signal_name(number: int | None) -> str | None:
    """The name of a signal, without SIG; of one without a name its number."""
    if number is None:
        return None
    try:
        return signal.Signals(number).name.removeprefix("SIG")
    except ValueError:
        return str(number)


def process_answer(record: ProcessRecord) -> dict[str, Any]:
    """The record of a process. Fields that aren't known (yet) are null."""
    return {
        "process_id": record.id,
        "tag": record.tag,
        "command": record.command,
        "status": record.status,
        "pid": record.pid,
        "stdin": record.stdin,
        "pty": record.pty,
        "started_at": timestamp(record.started_at),
        "ended_at": None if record.ended_at is None else timestamp(record.ended_at),
        "exit_code": record.exit_code,
        "signal": signal_name(record.signal),
        "reason": record.reason,
        "output_bytes": None if record.status == "lost" else record.output_bytes,
    }


def piece_fields(piece: Piece) -> dict[str, Any]:
    """The fields of an event of output: text where it is text, else its bytes in base64."""
    try:
        return {"content": piece.data.decode(), "encoding": "utf-8"}
    except UnicodeDecodeError:
        return {"content": b64encode(piece.data).decode(), "encoding": "base64"}


def exit_fields(event: Exit) -> dict[str, Any]:
    """The fields of a process's last event."""
    return {"exit_code": event.exit_code, "signal": signal_name(event.signal), "reason": event.reason}


def message(kind: str, **fields: Any) -> str:
    """A text message of a WebSocket."""
    return json.dumps({"type": kind, **fields}, ensure_ascii=False)
