"""`era runs`: the runs that there were and are."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from era.client.follow import follow
from era.client.grammar import Parser
from era.client.output import exit_code, notice, pairs, print_json, print_text, table
from era.client.servers import connect
from era.sdk.answers import RunRecord

_LISTED_CHARACTERS = 60
"""Length to which lists cut the first line of the code or command."""


def add(parser: Parser) -> None:
    command = parser.group("List, follow and stop runs.")
    each = command("list", "list runs, newest first")
    each.describe(
        list_, "List runs, newest first: of a session, or of all.", ("era runs list", "era runs list app -n 5")
    )
    each.add_argument("session", metavar="SESSION", nargs="?")
    each.add_argument("-n", "--limit", type=int, default=20, metavar="N", help="how many at most (20)")
    each.add_argument("--status", help="only those with this status")

    for name, call, summary in (
        ("show", show, "show a run's record"),
        ("wait", wait, "wait for a run's end and leave with its exit code"),
        ("stop", stop, "end a run: SIGTERM, and SIGKILL two seconds later"),
        ("follow", follow_, "print a run's output from its beginning, while it lasts"),
        ("output", output, "print what a run wrote"),
    ):
        each = command(name, summary)
        each.describe(call, f"{summary}.", (f"era runs {name} app run_…",))
        each.add_argument("session", metavar="SESSION")
        each.add_argument("run", metavar="RUN")
        if name == "output":
            each.add_argument("--stderr", action="store_true", help="that to standard error instead")


def list_(named: Any) -> None:
    with connect(named) as era:
        found = era.runs(named.limit, session=named.session, status=named.status)
    if named.json:
        print_json({"runs": [record.answer for record in found], "count": len(found)})
        return
    names = ("run", "session", "status", "exit", "started", "took", "code")
    rows = [(r.run_id, r.session_id, r.status, r.exit_code, r.started_at, r.duration, _first_line(r)) for r in found]
    table(names, rows)


def show(named: Any) -> None:
    with connect(named) as era:
        record = era.sessions.named(named.session).runs.get(named.run)
    _print(named, record)
    text = _program(record)
    if named.json or text is None:
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


def wait(named: Any) -> int:
    with connect(named) as era:
        record = era.sessions.named(named.session).runs.run(named.run).wait()
    _print(named, record)
    return exit_code(record.exit_code, ok=record.status == "ok")


def stop(named: Any) -> None:
    with connect(named) as era:
        _print(named, era.sessions.named(named.session).runs.run(named.run).stop())


def follow_(named: Any) -> int:
    with connect(named) as era:
        session = era.sessions.named(named.session)
        return follow(session, lambda: session.runs.run(named.run).stream(), as_json=named.json, found=True)


def output(named: Any) -> None:
    with connect(named) as era:
        content = era.sessions.named(named.session).runs.run(named.run).output("stderr" if named.stderr else "stdout")
    if named.json:
        print_json({"content": content.decode(errors="replace")})
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)


def _print(named: Any, record: RunRecord) -> None:
    if named.json:
        print_json(record.answer)
        return
    shown = ("run_id", "session_id", "status", "exit_code", "started_at", "ended_at", "duration", "stdout_bytes",
             "stderr_bytes", "peak_memory_bytes", "cpu_seconds")  # fmt: skip
    pairs({name: record.answer.get(name) for name in shown} | {"version": record.state.version})
