"""`era shell`: a login shell in a session, in this terminal."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from era.client.command import SESSION, Command, argument
from era.client.output import exit_code, notice
from era.client.servers import connect
from era.errors import EraError, NotFound
from era.sdk.events import Gap, ProcessOutput
from era.sdk.sync.processes import Process

_PIECE = 4096


def shell(named: Any) -> int:
    with connect(named) as era:
        processes = era.sessions.named(named.session).processes
        size = shutil.get_terminal_size()
        if named.process is not None:
            process = processes.process(named.process)
            if sys.stdin.isatty():
                process.resize(size.columns, size.lines)
        else:
            options = {} if named.tag is None else {"tag": named.tag}
            process = processes.terminal(size.columns, size.lines, **options)
        threading.Thread(target=_type, args=(process,), daemon=True).start()
        try:
            with _raw_terminal(process):
                return _show(process)
        except NotFound:
            raise
        except (EraError, KeyboardInterrupt):
            notice(f"the shell may go on: `era shell {named.session} --process {process.id}` goes back to it")
            raise


def _show(process: Process) -> int:
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


COMMANDS = {
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
    )
}
