"""`era audit`: who did what."""

from __future__ import annotations

import json

from era.client.command import LIMIT_20, Command, argument, lists

COMMANDS = {
    "audit": Command(
        "Show who did what, newest first: what was done with your keys, or as the server's operator all.",
        lists(
            lambda era, named: era.audit(
                named.limit,
                action=named.action,
                target=named.target,
                owner=named.owner,
                since=named.since,
                until=named.until,
            ),
            "entries",
            {
                "when": "at",
                "owner": "owner",
                "key": "key",
                "action": "action",
                "target": "target",
                "details": lambda entry: json.dumps(entry.details, ensure_ascii=False) if entry.details else "",
            },
        ),
        ["era audit", "era audit app -n 5", "era audit --action key.rotate --since 2026-01-31T12:00:00Z"],
        [
            argument("target", metavar="TARGET", nargs="?", help="only what was done to this session, key or owner"),
            LIMIT_20,
            argument("--action", help="only this, such as session.delete or key.rotate"),
            argument("--owner", metavar="OWNER", help="only what this owner did; needs the operator's key"),
            argument("--since", metavar="TIME", help="only from then on"),
            argument("--until", metavar="TIME", help="only before then"),
        ],
    )
}
