"""Following a run: its output as it comes, its exit code at the end, and Ctrl-C, which asks it to stop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from era.client.output import notice, print_json
from era.errors import EraError
from era.run_notes import GAP, run_notes
from era.sdk.events import CellError, ClearOutput, Gap, RunEvent, Shown, Stderr
from era.sdk.sync.runs import ExecuteStream, RunStream
from era.sdk.sync.sessions import Session

_INTERRUPTED = 130


def follow(session: Session, start: Callable[[], RunStream], *, as_json: bool = False, found: bool = False) -> int:
    """Print the output of a run that `start` starts, or that it has `found`, or `as_json` the run's answer at its end;
    returns its exit code. At Ctrl-C the run is asked to stop, and the rest of its output is printed; at the next one it
    is left. One that was started is stopped, too, where nobody reads its output any more."""
    stopped = False
    stream: RunStream | None = None
    kept: dict[str, list[str]] = {"stdout": [], "stderr": []}
    while True:
        try:
            if stream is None:
                stream = start()
            _print(stream, kept if as_json else None)
            break
        except BrokenPipeError:
            if stream is not None and not found:
                _stop(session, stream)
            raise
        except KeyboardInterrupt:
            if stopped or stream is None or stream.run_id is None:
                _leave(session)
                return _INTERRUPTED
            notice("asking the run to stop; Ctrl-C once more leaves it")
            stopped = True
            try:
                run = session.runs.run(stream.run_id)
                run.stop()
                stream = run.stream(stream.position)
            except KeyboardInterrupt:
                _leave(session)
                return _INTERRUPTED
    result = stream.result
    if as_json:  # the stream may have begun behind what was printed before Ctrl-C
        print_json({**result.answer, **{name: "".join(pieces) for name, pieces in kept.items()}})
        return _INTERRUPTED if stopped else result.exit_code
    _tell_end(result.answer, stopped)
    return _INTERRUPTED if stopped else result.exit_code


def follow_once(stream: ExecuteStream) -> int:
    """Print the output of a run without a session; returns its exit code. Ctrl-C hangs up, which ends it."""
    try:
        with stream:
            _print(stream)
    except KeyboardInterrupt:
        return _INTERRUPTED
    _tell_end(stream.result.answer)
    return stream.result.exit_code


def _print(events: Iterable[RunEvent], kept: dict[str, list[str]] | None = None) -> None:
    """Print output and what a cell shows as it comes, or put the output into `kept`."""
    for event in events:
        if isinstance(event, Gap):
            notice(GAP[1:-1])
            continue
        if isinstance(event, Shown):
            if kept is None:
                print(event.data.get("text/plain", f"<{', '.join(event.data)}>"), flush=True)
            continue
        if isinstance(event, ClearOutput | CellError):
            continue
        if kept is not None:
            kept["stderr" if isinstance(event, Stderr) else "stdout"].append(event.content)
            continue
        output = sys.stderr if isinstance(event, Stderr) else sys.stdout
        output.write(event.content)
        output.flush()


def _tell_end(answer: dict[str, Any], stopped: bool = False) -> None:
    if answer["status"] not in ("ok", "failed") and not stopped:
        notice(f"{answer['status']} after {answer['duration']}")
    for note in run_notes(answer):
        notice(note[1:-1])


def _stop(session: Session, stream: RunStream) -> None:
    try:
        if not session.ephemeral:
            stream.stop()
    except (EraError, KeyboardInterrupt):
        _leave(session)


def _leave(session: Session) -> None:
    if not session.ephemeral:  # that one is deleted now, and its run with it
        notice(f"the run may be going on: `era runs list {session.id}`")
