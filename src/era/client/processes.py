"""`era ps`, `logs`, `kill`, `checkpoint`: the processes of a live session, and its files."""

from __future__ import annotations

import sys
from typing import Any

from era.client.grammar import Parser
from era.client.output import exit_code, notice, print_json, table
from era.client.servers import connect
from era.sdk.answers import ProcessInfo
from era.sdk.events import Gap, ProcessOutput
from era.sdk.sync.processes import Process


def add(parser: Parser) -> None:
    command = parser.prog.rpartition(" ")[2]
    if command == "ps":
        parser.describe(ps, "List a session's processes: those that run and those that ended last.", ("era ps app",))
        parser.add_argument("session", metavar="SESSION")
        return
    if command == "checkpoint":
        parser.describe(
            checkpoint,
            "Make what a session's files are at this moment its next version, and print its number.\n\nWaits for the "
            "run under way. Processes go on.",
            ("era checkpoint app",),
        )
        parser.add_argument("session", metavar="SESSION")
        return
    parser.add_argument("session", metavar="SESSION")
    parser.add_argument("process", metavar="PROCESS", help="its id or tag")
    if command == "logs":
        parser.describe(
            logs,
            "Print what a process has written, of which the last MiB is kept, and follow it to its end.\n\nLeaves with "
            "its exit code. Ctrl-C ends the listening, not the process.",
            ("era logs app web", "era logs app web --no-follow"),
        )
        parser.add_argument("--no-follow", action="store_true", help="leave when all that is there is printed")
    else:
        parser.describe(
            kill,
            "End a process: SIGTERM, and SIGKILL two seconds later; or send a signal.",
            ("era kill app web", "era kill app web --signal HUP"),
        )
        parser.add_argument("--signal", metavar="NAME", help="send this one, and no other")


def ps(named: Any) -> None:
    with connect(named) as era:
        found = era.sessions.named(named.session).processes.list()
    if named.json:
        print_json({"processes": [each.answer for each in found], "count": len(found)})
        return
    names = ("process", "tag", "status", "exit", "started", "command")
    table(names, [(p.process_id, p.tag, p.status, p.exit_code, p.started_at, _line(p)) for p in found])


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


def kill(named: Any) -> None:
    with connect(named) as era:
        process = era.sessions.named(named.session).processes.process(named.process)
        if named.signal is None:
            info = process.stop()
        else:
            process.signal(named.signal)
            info = process.info()
    if named.json:
        print_json(info.answer)


def checkpoint(named: Any) -> None:
    with connect(named) as era:
        made = era.sessions.named(named.session).checkpoint()
    if named.json:
        print_json(made.answer)
        return
    print(made.version)
    if not made.consistent:
        notice("files were written to meanwhile: they may be of different moments")


def _line(process: ProcessInfo) -> str:
    command = process.command
    return (command if isinstance(command, str) else " ".join(command))[:100]
