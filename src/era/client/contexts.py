"""`era contexts`: interpreters of a session that stay. Cells are run in them by `era run --context`."""

from __future__ import annotations

from typing import Any

from era.client.grammar import Parser
from era.client.output import notice, print_json, table
from era.client.servers import connect


def add(parser: Parser) -> None:
    command = parser.group("List, interrupt, restart and delete a session's contexts.")
    each = command("list", "list a session's contexts")
    each.describe(list_, "List a session's contexts: interpreters whose variables stay.", ("era contexts list app",))
    each.add_argument("session", metavar="SESSION")

    for name, call, summary in (
        ("interrupt", interrupt, "interrupt the cell under way in a context, as Ctrl-C does"),
        ("restart", restart, "give a context a new interpreter, without the variables of the old one"),
        ("delete", delete, "end a context, and a run in it"),
    ):
        each = command(name, summary)
        each.describe(call, f"{summary[0].upper()}{summary[1:]}.", (f"era contexts {name} app main",))
        each.add_argument("session", metavar="SESSION")
        each.add_argument("context", metavar="CONTEXT")


def list_(named: Any) -> None:
    with connect(named) as era:
        found = era.sessions.named(named.session).contexts()
    if named.json:
        print_json({"contexts": [each.answer for each in found], "count": len(found)})
        return
    names = ("context", "status", "cells", "memory", "started", "kernel")
    table(names, [(c.name, c.status, c.execution_count, c.memory_bytes, c.started_at, c.kernel) for c in found])


def interrupt(named: Any) -> None:
    with connect(named) as era:
        interrupted = era.sessions.named(named.session).context(named.context).interrupt()
    if named.json:
        print_json({"success": True, "name": named.context, "interrupted": interrupted})
    elif not interrupted:
        notice("no cell was under way")


def restart(named: Any) -> None:
    with connect(named) as era:
        restarted = era.sessions.named(named.session).context(named.context).restart()
    if named.json:
        print_json(restarted.answer)


def delete(named: Any) -> None:
    with connect(named) as era:
        era.sessions.named(named.session).context(named.context).delete()
    if named.json:
        print_json({"success": True, "name": named.context})
