"""`era exec`: a command in a session, as a run of it."""

from __future__ import annotations

from typing import Any

from era.client.argument_values import RUN_OPTIONS, run_options
from era.client.command import Command, argument
from era.client.failure import Failure
from era.client.follow import follow
from era.client.output import print_json
from era.client.servers import connect


def exec_(named: Any) -> int:
    if not named.args:
        raise Failure("There is no command to run.\n     era exec SESSION -- COMMAND ARGS…")
    if named.tag is not None and not named.process:
        raise Failure("--tag is the name of a process: start one with --process.")
    if named.interactive and not named.process:
        raise Failure("--interactive is for processes: start one with --process. A run gets its input by --stdin.")
    options = run_options(named)
    if named.process:
        return _start(named, options)
    options["command"] = named.args[0] if len(named.args) == 1 else named.args
    with connect(named) as era:
        session = era.sessions.named(named.session)
        if named.background:
            begun = session.run(background=True, **options)
            if named.json:
                print_json({"run_id": begun.id, "status": "running"})
            else:
                print(begun.id)
            return 0
        return follow(session, lambda: session.stream(**options), as_json=named.json)


def _start(named: Any, options: dict[str, Any]) -> int:
    """Start a process, and print its id."""
    for option in ("stdin", "atomic", "no_record_code", "background"):
        if getattr(named, option) not in (None, False):
            raise Failure(f"--{option.replace('_', '-')} is for runs, not for processes.")
    if named.tag is not None:
        options["tag"] = named.tag
    if named.interactive:
        options["stdin"] = True
    with connect(named) as era:
        command = named.args[0] if len(named.args) == 1 else named.args
        process = era.sessions.named(named.session).process(command, **options)
        if named.json:
            print_json(process.info().answer)
        else:
            print(process.id)
    return 0


COMMANDS = {
    "exec": Command(
        "Run a command in a session and leave with its exit code.\n\nOne word is a line for the shell, several are a "
        "program and its arguments. What it leaves is committed,\nas of any run. Ctrl-C asks it to stop.",
        exec_,
        [
            "era exec app 'ls -l | head'",
            "era exec app -- python3 -m pytest -q",
            "era exec app --timeout 600 --background -- make all",
            "era exec app --process --tag web -- npm run dev",
            "era exec app --process --interactive --tag db -- sqlite3 shop.db",
        ],
        [
            argument("session", metavar="SESSION", help="the session's id"),
            argument("args", metavar="COMMAND", nargs="*", help="behind -- its words may begin with hyphens"),
            *RUN_OPTIONS,
            argument(
                "--process",
                action="store_true",
                help="start it as a process, which goes on beside runs, and print its id",
            ),
            argument("--tag", help="a name for the process"),
            argument(
                "-i",
                "--interactive",
                action="store_true",
                help="give the process input, by `era shell SESSION --process ID`",
            ),
        ],
    )
}
