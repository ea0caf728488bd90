"""`era contexts`: interpreters of a session that stay. Cells are run in them by `era run --context`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from era.client.command import SESSION, Command, Group, argument, calls, does, lists, on_session
from era.client.output import notice

if TYPE_CHECKING:
    from era.sdk.sync.sessions import Session

_CONTEXT = (SESSION, argument("context", metavar="CONTEXT"))


def _interrupt(session: Session, named: Any) -> dict[str, Any]:
    return {"success": True, "name": named.context, "interrupted": session.context(named.context).interrupt()}


def _show_interrupted(found: dict[str, Any]) -> None:
    if not found["interrupted"]:
        notice("no cell was under way")


COMMANDS = {
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
    )
}
