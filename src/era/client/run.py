"""`era run` and `era exec`: a program or a command as a run, with its output and its exit code."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from era.client.command import RUN_OPTIONS, Command, argument, json_object, labels, run_options, text_of
from era.client.output import Failure, notice, print_json
from era.client.runs import follow, follow_once
from era.client.servers import connect
from era.errors import NotFound
from era.sdk.sync.client import Era
from era.sdk.sync.runs import RunStream
from era.sdk.sync.sessions import Session

_ABANDONED_SECONDS = 3600
"""After so long a session goes that a command made for itself and could not delete."""


def run(named: Any) -> int:
    if named.code is None:
        if not named.words:
            raise Failure("There is nothing to run.\n     era run FILE, or era run -c CODE.")
        named.file, *named.args = named.words
    else:
        named.file, named.args = None, named.words
    if named.stdin == named.file == "-":
        raise Failure("Standard input can't be both the program and its input.")
    data = json_object(named.data, "--data")
    if named.session is None and data is not None:
        raise Failure("--data is the state of a session: say which with --session.")
    if named.session is None and named.background:
        raise Failure("--background needs a session that stays: say which with --session.")
    if named.files and not named.once:
        raise Failure("--file is for --once. To a session: era files write SESSION PATH FILE.")
    if named.once:
        for name in ("session", "context", "data", "atomic", "no_record_code", "background", "idempotency_key"):
            if getattr(named, name) not in (None, False):
                raise Failure(f"--{name.replace('_', '-')} is about a session, and --once has none.")
    code = text_of(named.file) if named.code is None else named.code
    options = run_options(named)
    if named.args:
        options["args"] = named.args
    if named.context is not None:
        if named.session is None:
            raise Failure("--context is an interpreter of a session: say which with --session.")
        options["context"] = named.context
    with connect(named) as era:
        if named.once:
            return _once(era, named, code, options)
        if named.session is None:
            language = _language(era, named)
            session = era.session(language, ttl=_ABANDONED_SECONDS, metadata={"made_by": "era run"})
            try:
                return _run(session, named, code, options)
            finally:
                with suppress(NotFound):
                    session.delete(purge=True)
        if data is None and named.language is None:
            # Most often the session is there, and one call is all that it takes.
            session = era.sessions.named(named.session)
            try:
                return _run(session, named, code, options)
            except NotFound as error:
                if error.code != "not_found":
                    raise
        return _run(_session(era, named, data), named, code, options)


def _run(session: Session, named: Any, code: str | None, options: dict[str, Any]) -> int:
    if named.background:
        begun = session.run(code, background=True, **options)
        if named.json:
            print_json({"run_id": begun.id, "status": "running"})
        else:
            print(begun.id)
        return 0

    def start() -> RunStream:
        return session.stream(code, **options)

    return follow(session, start, as_json=named.json)


def _once(era: Era, named: Any, code: str, options: dict[str, Any]) -> int:
    files = {name: text_of(path) for name, path in labels(named.files).items()}
    stream = era.stream(_language(era, named), code, files=files, **options)
    if not named.json:
        return follow_once(stream)
    with stream:
        result = stream.wait()
    print_json(result.answer)
    return result.exit_code


def _session(era: Era, named: Any, data: dict[str, Any] | None) -> Session:
    """The session that is asked for, with its data replaced unless that is None; made if it doesn't exist."""
    try:
        session = era.sessions.get(named.session)
    except NotFound:
        return era.session(_language(era, named, named.session), named.session, data=data or {})
    if data is not None:
        session.data.replace(data)
    if named.language is not None and named.language != session.language:
        notice(f"session '{session.id}' runs {session.language}")
    return session


def _language(era: Era, named: Any, session: str | None = None) -> str:
    """The language that is named, or the server's for the ending of the file's name. Raises Failure."""
    if named.language is not None:
        return str(named.language)
    if named.file is None and session is None:
        return "python"
    ending = os.path.splitext(named.file or "")[1]
    found = next((language.name for language in era.languages() if ending and ending in language.endings), None)
    if found is None and session is not None:
        raise Failure(f"There is no session '{session}'. To make it, say --language.", "not_found")
    if found is None:
        raise Failure(f"Which language is {named.file}? Say so with --language.")
    return found


def exec_(named: Any) -> int:
    if not named.args:
        raise Failure("There is no command to run.\n     era exec SESSION -- COMMAND ARGS…")
    if named.tag is not None and not named.process:
        raise Failure("--tag is the name of a process: start one with --process.")
    if named.interactive and not named.process:
        raise Failure("--interactive is for processes: start one with --process. A run gets its input by --stdin.")
    if named.process:
        return _start(named, run_options(named, is_run=False))
    options = run_options(named)
    options["command"] = named.args[0] if len(named.args) == 1 else named.args
    with connect(named) as era:
        return _run(era.sessions.named(named.session), named, None, options)


def _start(named: Any, options: dict[str, Any]) -> int:
    """Start a process, and print its id."""
    for option in ("stdin", "atomic", "no_record_code", "background", "idempotency_key"):
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
    "run": Command(
        "Run FILE on a server and leave with its exit code.\n\nOptions stand before FILE: all that follows it is for "
        "the program, and so is what is piped in.\n\nWith --session the code runs in that session, which is made if it "
        "does not exist; without, in one that\nis deleted afterwards. Ctrl-C asks the run to stop.\n\nWith --once "
        "there is no session at all: one call, of which nothing is kept. Ctrl-C ends the program.",
        run,
        [
            "era run hello.py",
            "era run --session counter --data '{\"count\": 0}' count.py",
            "era run -c 'print(1 + 1)'",
            "cat numbers.csv | era run report.py --verbose 2026",
            "era run --language node --env NAME=Ada hello.js",
            "era run --secret GITHUB_TOKEN=api.github.com issues.py",
            "era run --once --file solution.py=upload/42.py test.py",
        ],
        [
            argument("file", metavar="FILE", nargs="?", help="the program; - for standard input"),
            argument("args", metavar="ARGS", nargs="*", help="the program's arguments"),
            argument("-c", dest="code", metavar="CODE", help="run this code in place of FILE"),
            argument("-s", "--session", help="run in this session"),
            argument("-l", "--language", help="default: by FILE's ending; of CODE python"),
            argument("--context", metavar="NAME", help="as a cell in the session's interpreter of this name"),
            argument("--data", metavar="JSON", help="object that becomes the session's data before the run"),
            argument("--once", action="store_true", help="without a session: nothing of it is kept"),
            argument(
                "--file",
                action="append",
                default=[],
                dest="files",
                metavar="NAME=PATH",
                help="with --once: a text file beside the program",
            ),
            *RUN_OPTIONS,
        ],
        is_program=True,
    ),
    "exec": Command(
        "Run a command in a session and leave with its exit code.\n\nOne word is a line for the shell, several are a "
        "program and its arguments. What it leaves is committed,\nas of any run. It gets what is piped in. Ctrl-C asks "
        "it to stop.",
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
    ),
}
