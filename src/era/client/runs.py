"""`era runs`: the runs that there were and are; and following one, with its output and its exit code."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable
from typing import Any

from era.client.command import LIMIT_20, SESSION, Call, Command, Group, argument, calls, lists, on_session
from era.client.output import exit_code, notice, pairs, print_json, print_text
from era.client.servers import connect
from era.common.run_notes import GAP, run_notes
from era.errors import EraError
from era.sdk.answers import RunRecord
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
            _print_events(stream, kept if as_json else None)
            break
        except BrokenPipeError:
            if stream is not None and not found:
                _stop_run(session, stream)
            raise
        except KeyboardInterrupt:
            if stopped or stream is None or stream.run_id is None:
                _leave(session)
                return _INTERRUPTED
            notice("asking the run to stop; Ctrl-C once more leaves it")
            stopped = True
            try:
                run = session.runs.get(stream.run_id)
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
            _print_events(stream)
    except KeyboardInterrupt:
        return _INTERRUPTED
    _tell_end(stream.result.answer)
    return stream.result.exit_code


def _print_events(events: Iterable[RunEvent], kept: dict[str, list[str]] | None = None) -> None:
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


def _stop_run(session: Session, stream: RunStream) -> None:
    try:
        if not session.is_temporary:
            stream.stop()
    except (EraError, KeyboardInterrupt):
        _leave(session)


def _leave(session: Session) -> None:
    if not session.is_temporary:  # that one is deleted now, and its run with it
        notice(f"the run may be going on: `era runs list {session.id}`")


_LISTED_CHARACTERS = 60
"""Length to which lists cut the first line of the code or command."""

_SHOWN = (
    "run_id",
    "session_id",
    "status",
    "exit_code",
    "started_at",
    "ended_at",
    "duration",
    "stdout_bytes",
    "stderr_bytes",
    "peak_memory_bytes",
    "cpu_seconds",
)


def _show_fields(record: RunRecord) -> None:
    pairs({name: record.answer.get(name) for name in _SHOWN} | {"version": record.state.version})


def _show(record: RunRecord) -> None:
    _show_fields(record)
    text = _program(record)
    if text is None:
        return
    print("\ncode:" if record.command is None else "\ncommand:")
    print_text(text)
    if record.args:
        print("\nargs:")
        print_text(shlex.join(record.args))
    if record.code_truncated:
        notice("the record keeps only the beginning of this")


def _program(record: RunRecord) -> str | None:
    """The code or command line that ran; None where the record has neither."""
    if record.command is None or isinstance(record.command, str):
        return record.code if record.command is None else record.command
    return shlex.join(record.command)


def _first_line(record: RunRecord) -> str:
    """The first line of the code or command, cut to _LISTED_CHARACTERS; a command follows a `$`."""
    first, _, rest = (_program(record) or "").strip().partition("\n")
    text = first.rstrip() if record.command is None else f"$ {first.rstrip()}"
    is_cut = bool(rest) or len(text) > _LISTED_CHARACTERS or record.code_truncated
    return text[:_LISTED_CHARACTERS] + ("…" if is_cut else "")


def _wait(named: Any) -> int:
    with connect(named) as era:
        record = era.sessions.named(named.session).runs.get(named.run).wait()
    if named.json:
        print_json(record.answer)
    else:
        _show_fields(record)
    return exit_code(record.exit_code, ok=record.status == "ok")


def _follow(named: Any) -> int:
    with connect(named) as era:
        session = era.sessions.named(named.session)
        return follow(session, lambda: session.runs.get(named.run).stream(), as_json=named.json, found=True)


def _output(named: Any) -> None:
    with connect(named) as era:
        content = era.sessions.named(named.session).runs.get(named.run).output("stderr" if named.stderr else "stdout")
    if named.json:
        print_json({"content": content.decode(errors="replace")})
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)


def _on_run(name: str, text: str, call: Call, *more: Any) -> Command:
    return Command(text, call, [f"era runs {name} app run_…"], [SESSION, argument("run", metavar="RUN"), *more])


COMMANDS = {
    "runs": Group(
        "List, follow and stop runs.",
        {
            "list": Command(
                "List runs, newest first: of a session, or of all.",
                lists(
                    lambda era, named: era.runs(named.limit, session=named.session, status=named.status),
                    "runs",
                    {
                        "run": "run_id",
                        "session": "session_id",
                        "status": "status",
                        "exit": "exit_code",
                        "started": "started_at",
                        "took": "duration",
                        "code": _first_line,
                    },
                ),
                ["era runs list", "era runs list app -n 5"],
                [
                    argument("session", metavar="SESSION", nargs="?"),
                    LIMIT_20,
                    argument("--status", help="only those with this status"),
                ],
                summary="list runs, newest first",
            ),
            "get": _on_run(
                "get",
                "Show a run's record.",
                calls(on_session(lambda session, named: session.runs.get(named.run).record()), _show),
            ),
            "wait": _on_run("wait", "Wait for a run's end and leave with its exit code.", _wait),
            "stop": _on_run(
                "stop",
                "End a run: SIGTERM, and SIGKILL two seconds later.",
                calls(on_session(lambda session, named: session.runs.get(named.run).stop()), _show_fields),
            ),
            "follow": _on_run("follow", "Print a run's output from its beginning, while it lasts.", _follow),
            "output": _on_run(
                "output",
                "Print what a run wrote.",
                _output,
                argument("--stderr", action="store_true", help="that to standard error instead"),
            ),
        },
    ),
}
