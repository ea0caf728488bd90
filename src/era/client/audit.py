"""`era audit`: who did what."""

from __future__ import annotations

import json
from typing import Any

from era.client.grammar import Parser
from era.client.output import print_json, table
from era.client.servers import connect


def add(parser: Parser) -> None:
    parser.describe(
        audit,
        "Show who did what, newest first: what was done with your keys, or as the server's operator all.",
        ("era audit", "era audit app -n 5", "era audit --action key.rotate --since 2026-01-31T12:00:00Z"),
    )
    parser.add_argument("target", metavar="TARGET", nargs="?", help="only what was done to this session, key or owner")
    parser.add_argument("-n", "--limit", type=int, default=20, metavar="N", help="how many at most (20)")
    parser.add_argument("--action", help="only this, such as session.delete or key.rotate")
    parser.add_argument("--owner", metavar="OWNER", help="only what this owner did; needs the operator's key")
    parser.add_argument("--since", metavar="TIME", help="only from then on")
    parser.add_argument("--until", metavar="TIME", help="only before then")


def audit(named: Any) -> None:
    with connect(named) as era:
        found = era.audit(
            named.limit,
            action=named.action,
            target=named.target,
            owner=named.owner,
            since=named.since,
            until=named.until,
        )
    if named.json:
        print_json({"entries": [entry.answer for entry in found], "count": len(found)})
        return
    names = ("when", "owner", "key", "action", "target", "details")
    rows = [
        (e.at, e.owner, e.key, e.action, e.target, json.dumps(e.details, ensure_ascii=False) if e.details else "")
        for e in found
    ]
    table(names, rows)
