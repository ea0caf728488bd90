"""`era inbox`: a session's inbox and what was delivered to it."""

from __future__ import annotations

import os
from typing import Any

from era.client.failure import Failure
from era.client.grammar import Parser
from era.client.output import pairs, print_json, table
from era.client.servers import connect


def add(parser: Parser) -> None:
    command = parser.group("Webhooks that are stored first, then run in order.")
    for name, call, summary, example in (
        ("show", show, "show a session's inbox", "era inbox show app"),
        (
            "set",
            set_,
            "give a session an inbox, or change it",
            "era inbox set app --scheme github --secret HOOK_SECRET",
        ),
        ("delete", delete, "remove an inbox with all its deliveries", "era inbox delete app"),
        ("list", list_, "list deliveries, newest first", "era inbox list app --status failed"),
        ("delivery", delivery, "show a delivery with its request", "era inbox delivery app dlv_…"),
        ("replay", replay, "run a delivery once more", "era inbox replay app dlv_…"),
    ):
        each = command(name, summary)
        each.describe(call, f"{summary}.", (example,))
        each.add_argument("session", metavar="SESSION")
        if name == "set":
            each.add_argument("--retries", type=int, metavar="N", help="how often one that failed is tried again")
            each.add_argument("--scheme", choices=("github", "stripe", "hmac"), help="how deliveries are signed")
            each.add_argument("--secret", metavar="VARIABLE", help="the variable here that has the secret")
            each.add_argument("--header", help="the header that has the signature")
        elif name == "list":
            each.add_argument("--status", choices=("pending", "running", "done", "failed"))
            each.add_argument("-n", "--limit", type=int, default=20, metavar="N", help="how many at most (20)")
        elif name in ("delivery", "replay"):
            each.add_argument("delivery", metavar="DELIVERY")


def show(named: Any) -> None:
    with connect(named) as era:
        _print(named, era.sessions.named(named.session).inbox.get().answer)


def set_(named: Any) -> None:
    verify = None
    if named.scheme or named.secret:
        if not (named.scheme and named.secret):
            raise Failure("--scheme and --secret belong together.")
        if named.secret not in os.environ:
            raise Failure(f"--secret names a variable, and there is no variable {named.secret} here.")
        verify = {"scheme": named.scheme, "secret": os.environ[named.secret]}
        if named.header:
            verify["header"] = named.header
    with connect(named) as era:
        inbox = era.sessions.named(named.session).inbox.set(verify=verify, retries=named.retries)
    _print(named, inbox.answer)


def delete(named: Any) -> None:
    with connect(named) as era:
        dropped = era.sessions.named(named.session).inbox.delete()
    if named.json:
        print_json({"success": True, "deleted_deliveries": dropped})


def list_(named: Any) -> None:
    with connect(named) as era:
        found = era.sessions.named(named.session).inbox.deliveries(named.status, named.limit)
    if named.json:
        print_json({"deliveries": [each.answer for each in found], "count": len(found)})
        return
    names = ("delivery", "received", "status", "attempts", "request")
    table(names, [(d.id, d.received_at, d.status, d.attempts, f"{d.method} {d.path}") for d in found])


def delivery(named: Any) -> None:
    with connect(named) as era:
        _print(named, era.sessions.named(named.session).inbox.delivery(named.delivery).answer)


def replay(named: Any) -> None:
    with connect(named) as era:
        _print(named, era.sessions.named(named.session).inbox.replay(named.delivery).answer)


def _print(named: Any, answer: dict[str, Any]) -> None:
    if named.json:
        print_json(answer)
    else:
        pairs(dict(answer))
