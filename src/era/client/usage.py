"""`era usage`: what owners have used on each day."""

from __future__ import annotations

from era.client.command import Command, argument, lists

COMMANDS = {
    "usage": Command(
        "Show what was used on each day (UTC), newest first: yours, or as the server's operator everybody's.",
        lists(
            lambda era, named: era.usage(owner=named.owner, since=named.since, until=named.until),
            "usage",
            {
                "day": "day",
                "owner": "owner",
                "runs": "runs",
                "cpu s": lambda day: f"{day.cpu_seconds:.3f}",
                "egress": "egress_bytes",
                "storage": "storage_bytes",
                "disk": "disk_bytes",
            },
        ),
        ["era usage", "era usage --since 2026-01-01 --until 2026-01-31", "era usage --owner mina"],
        [
            argument("--owner", metavar="OWNER", help="only this owner's; needs the operator's key"),
            argument("--since", metavar="DATE", help="the first day; 30 days are shown without it"),
            argument("--until", metavar="DATE", help="the last day; today without it"),
        ],
    )
}
