"""`era ps`, `logs`, `kill`, `checkpoint`: the processes of a live session, and its files."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from era.client.command import SESSION, Command, argument, calls, lists, on_session
from era.client.output import exit_code, notice
from era.client.servers import connect
from era.sdk.answers import Checkpoint, ProcessInfo
from era.sdk.events import Gap, ProcessOutput

if TYPE_CHECKING:
    from era.sdk.sync.processes import Process
    from era.sdk.sync.sessions import Session

_PROCESS = (SESSION, argument("process", metavar="PROCESS", help="its id or tag"))


def logs(named: Any) -> int:
    with connect(named) as era:
        process = era.sessions.named(named.session).processes.process(named.process)
        if named.no_follow:
            info = process.info()
            if info.status == "running":
                print_output(process, info.answer["output_bytes"])
                return 0
        return print_output(process)


def print_output(process: Process, until: int | None = None) -> int:
    """Print what a process writes, to its end or to the byte with this number; returns its exit code, 0 before."""
    if until == 0:
        return 0
    seen = 0
    for event in process.events():
        if isinstance(event, ProcessOutput):
            output = sys.stderr if event.type == "stderr" else sys.stdout
            output.flush()
            output.buffer.write(event.data)
            output.buffer.flush()
            seen += len(event.data)
        elif isinstance(event, Gap):
            notice(f"{event.last - event.first + 1} bytes are no longer kept")
            seen = event.last
        else:
            if event.reason:
                notice(event.reason)
            return exit_code(event.exit_code)
        if until is not None and seen >= until:
            return 0
    return 0


def _kill(session: Session, named: Any) -> ProcessInfo:
    process = session.processes.process(named.process)
    if named.signal is None:
        return process.stop()
    process.signal(named.signal)
    return process.info()


def _show_checkpoint(made: Checkpoint) -> None:
    print(made.version)
    if not made.consistent:
        notice("files were written to meanwhile: they may be of different moments")


def _line(process: ProcessInfo) -> str:
    command = process.command
    return (command if isinstance(command, str) else " ".join(command))[:100]


COMMANDS = {
    "ps": Command(
        "List a session's processes: those that run and those that ended last.",
        lists(
            on_session(lambda session, _: session.processes.list()),
            "processes",
            {
                "process": "process_id",
                "tag": "tag",
                "status": "status",
                "exit": "exit_code",
                "started": "started_at",
                "command": _line,
            },
        ),
        ["era ps app"],
        [SESSION],
    ),
    "logs": Command(
        "Print what a process has written, of which the last MiB is kept, and follow it to its end.\n\nLeaves with "
        "its exit code. Ctrl-C ends the listening, not the process.",
        logs,
        ["era logs app web", "era logs app web --no-follow"],
        [*_PROCESS, argument("--no-follow", action="store_true", help="leave when all that is there is printed")],
    ),
    "kill": Command(
        "End a process: SIGTERM, and SIGKILL two seconds later; or send a signal.",
        calls(on_session(_kill)),
        ["era kill app web", "era kill app web --signal HUP"],
        [*_PROCESS, argument("--signal", metavar="NAME", help="send this one, and no other")],
    ),
    "checkpoint": Command(
        "Make what a session's files are at this moment its next version, and print its number.\n\nWaits for the "
        "run under way. Processes go on.",
        calls(on_session(lambda session, _: session.checkpoint()), _show_checkpoint),
        ["era checkpoint app"],
        [SESSION],
    ),
}
