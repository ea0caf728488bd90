"""`era runs`: the runs that there were and are."""

from __future__ import annotations

import sys
from typing import Any

from era.client.follow import follow
from era.client.grammar import Parser
from era.client.output import exit_code, pairs, print_json, table
from era.client.servers import connect
from era.sdk.answers import RunRecord


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
    names = ("run", "session", "status", "exit", "started", "took")
    table(names, [(r.run_id, r.session_id, r.status, r.exit_code, r.started_at, r.duration) for r in found])


def show(named: Any) -> None:
    with connect(named) as era:
        _print(named, era.sessions.named(named.session).runs.get(named.run))


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
