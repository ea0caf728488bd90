"""`era ps`, `logs`, `kill`, `checkpoint`, `shell`, `contexts`: what goes on in a session beside its runs."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from era.client.command import SESSION, Command, Group, argument, calls, does, lists, on_session
from era.client.output import exit_code, notice
from era.client.servers import connect
from era.errors import EraError, NotFound
from era.sdk.answers import Checkpoint, ProcessInfo
from era.sdk.events import Gap, ProcessOutput
from era.sdk.sync.processes import Process

if TYPE_CHECKING:
    from era.sdk.sync.sessions import Session


_PROCESS = (SESSION, argument("process", metavar="PROCESS", help="its id or tag"))


def logs(named: Any) -> int:
    with connect(named) as era:
        process = era.sessions.named(named.session).processes.get(named.process)
        if not named.follow:
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
    process = session.processes.get(named.process)
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


_PIECE = 4096


def shell(named: Any) -> int:
    with connect(named) as era:
        processes = era.sessions.named(named.session).processes
        size = shutil.get_terminal_size()
        if named.process is not None:
            process = processes.get(named.process)
            if sys.stdin.isatty():
                process.resize(size.columns, size.lines)
        else:
            options = {} if named.tag is None else {"tag": named.tag}
            process = processes.terminal(size.columns, size.lines, **options)
        threading.Thread(target=_type, args=(process,), daemon=True).start()
        try:
            with _raw_terminal(process):
                return _show_terminal(process)
        except NotFound:
            raise
        except (EraError, KeyboardInterrupt):
            notice(f"the shell may go on: `era shell {named.session} --process {process.id}` goes back to it")
            raise


def _show_terminal(process: Process) -> int:
    """Print what a terminal shows, to its end; returns the exit code."""
    for event in process.events():
        if isinstance(event, ProcessOutput):
            sys.stdout.buffer.write(event.data)
            sys.stdout.buffer.flush()
        elif not isinstance(event, Gap):
            if event.reason:
                notice(f"{event.reason}\r")
            return exit_code(event.exit_code)
    return 0


def _type(process: Process) -> None:
    """Send what is typed here, until there is no more. Keys that are lost are said so, and the next ones are sent; of
    input that isn't typed the rest would mean something else, so the shell is left."""
    data = b"-"
    while data:
        try:
            data = os.read(sys.stdin.fileno(), _PIECE)
            process.write(data) if data else process.close_stdin()
        except OSError:
            return
        except EraError as error:
            if isinstance(error, NotFound) or error.code == "process_ended":
                return  # which is shown
            if error.code == "no_input":  # nor will it take any later
                notice(f"{error.message}\r")
                return
            notice(f"input may be lost: {error.message}\r")
            if data and not sys.stdin.isatty():
                os.kill(os.getpid(), signal.SIGINT)
                return


@contextmanager
def _raw_terminal(process: Process) -> Iterator[None]:
    """Hand all keys to the process, Ctrl-C too, and tell it of this terminal's size; nothing if this is no terminal."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    resized = threading.Event()

    def resize() -> None:
        while True:
            resized.wait()
            resized.clear()
            size = shutil.get_terminal_size()
            try:
                process.resize(size.columns, size.lines)
            except EraError:
                return

    threading.Thread(target=resize, daemon=True).start()
    before = signal.signal(signal.SIGWINCH, lambda *_: resized.set())
    settings = termios.tcgetattr(sys.stdin)
    tty.setraw(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)
        signal.signal(signal.SIGWINCH, before)


_CONTEXT = (SESSION, argument("context", metavar="CONTEXT"))


def _interrupt(session: Session, named: Any) -> dict[str, Any]:
    return {"success": True, "name": named.context, "interrupted": session.context(named.context).interrupt()}


def _show_interrupted(found: dict[str, Any]) -> None:
    if not found["interrupted"]:
        notice("no cell was under way")


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
        "Print what a process has written, of which the last MiB is kept; with -f, go on to its end.\n\nLeaves with "
        "its exit code, 0 while it runs. Ctrl-C ends the listening, not the process.",
        logs,
        ["era logs app web", "era logs -f app web"],
        [*_PROCESS, argument("-f", "--follow", action="store_true", help="go on printing until the process ends")],
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
    "shell": Command(
        "Open a shell in a session, and leave with its exit code.\n\nIt works on the session's files, beside its runs. "
        "When the connection breaks for good the shell goes on:\n--process goes back to it.",
        shell,
        ["era shell app", "era shell app --process proc_…", "echo ls | era shell app"],
        [
            SESSION,
            argument("--process", metavar="PROCESS", help="go back to one that runs, by its id or tag"),
            argument("--tag", help="a name for the shell, to go back to it"),
        ],
        has_json=False,
    ),
    "contexts": Group(
        "List, interrupt, restart and delete a session's contexts.",
        {
            "list": Command(
                "List a session's contexts: interpreters whose variables stay.",
                lists(
                    on_session(lambda session, _: session.contexts()),
                    "contexts",
                    {
                        "context": "name",
                        "status": "status",
                        "cells": "execution_count",
                        "memory": "memory_bytes",
                        "started": "started_at",
                        "kernel": "kernel",
                    },
                ),
                ["era contexts list app"],
                [SESSION],
                summary="list a session's contexts",
            ),
            "interrupt": Command(
                "Interrupt the cell under way in a context, as Ctrl-C does.",
                calls(on_session(_interrupt), _show_interrupted),
                ["era contexts interrupt app main"],
                _CONTEXT,
            ),
            "restart": Command(
                "Give a context a new interpreter, without the variables of the old one.",
                calls(on_session(lambda session, named: session.context(named.context).restart())),
                ["era contexts restart app main"],
                _CONTEXT,
            ),
            "delete": Command(
                "End a context, and a run in it.",
                does(on_session(lambda session, named: session.context(named.context).delete()), name="context"),
                ["era contexts delete app main"],
                _CONTEXT,
            ),
        },
    ),
}
