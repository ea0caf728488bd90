"""`era usage`: what owners have used on each day."""

from __future__ import annotations

from typing import Any

from era.client.grammar import Parser
from era.client.output import print_json, table
from era.client.servers import connect


def add(parser: Parser) -> None:
    parser.describe(
        usage,
        "Show what was used on each day (UTC), newest first: yours, or as the server's operator everybody's.",
        ("era usage", "era usage --since 2026-01-01 --until 2026-01-31", "era usage --owner mina"),
    )
    parser.add_argument("--owner", metavar="OWNER", help="only this owner's; needs the operator's key")
    parser.add_argument("--since", metavar="DATE", help="the first day; 30 days are shown without it")
    parser.add_argument("--until", metavar="DATE", help="the last day; today without it")


def usage(named: Any) -> None:
    with connect(named) as era:
        days = era.usage(owner=named.owner, since=named.since, until=named.until)
    if named.json:
        print_json({"usage": [day.answer for day in days], "count": len(days)})
        return
    names = ("day", "owner", "runs", "cpu s", "egress", "storage", "disk")
    rows = [
        (d.day, d.owner, d.runs, f"{d.cpu_seconds:.3f}", d.egress_bytes, d.storage_bytes, d.disk_bytes) for d in days
    ]
    table(names, rows)
