"""`era keys`, `quotas`, `usage`, `audit`: who may call a server, use how much, and what they did."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from era.client.command import LIMIT_20, Argument, Command, Group, argument, calls, does, lists, quotas_of, seconds
from era.client.output import Failure, notice, table

if TYPE_CHECKING:
    from era.sdk.answers import ApiKey, Owner
    from era.sdk.sync.client import Era


_QUOTAS_HELP = "a quota of its own, such as runs_per_minute=60; may be given again"
_KEY = argument("key", metavar="KEY_ID", help="as `era keys list` shows it")


def _fields(quotas: str) -> list[Argument]:
    return [
        argument("--description", help="what it is for"),
        argument("--scope", action="append", metavar="SCOPE", help="read, run, write or admin; may be given again"),
        argument("--expires", metavar="TIME", help="when it ends, such as 2030-01-31T12:00:00Z, or never"),
        argument("--quota", action="append", metavar="NAME=N", help=quotas),
    ]


def _create(era: Era, named: Any) -> ApiKey:
    return era.keys.create(
        named.owner,
        named.description or "",
        scopes=named.scope,
        expires_at=_end(named.expires),
        quotas=quotas_of(named.quota) if named.quota else None,
    )


def _change(era: Era, named: Any) -> ApiKey:
    changes: dict[str, Any] = {"description": named.description, "scopes": named.scope}
    changes = {name: value for name, value in changes.items() if value is not None}
    if named.expires is not None:
        changes["expires_at"] = _end(named.expires)
    if named.quota:
        changes["quotas"] = quotas_of(named.quota)
    if not changes:
        raise Failure("Nothing is to be changed.\n     Say what: --description, --scope, --expires or --quota.")
    return era.keys.change(named.key, **changes)


def _end(word: str | None) -> str | None:
    """When a key ends, None for never."""
    return None if word == "never" else word


def _show_new(key: ApiKey) -> None:
    notice(f"{key.id} is a key of {key.owner}'s. It is not shown again:")
    print(key.key)


def _quotas(era: Era, named: Any) -> Owner:
    if named.set:
        return era.owners.set_quotas(named.owner or era.quotas().owner, **quotas_of(named.set))
    return era.quotas() if named.owner is None else era.owners.get(named.owner)


def _show(owner: Owner) -> None:
    rows = [(name, f"{owner.used.get(name, 0):g}", most or "no bound") for name, most in owner.quotas.items()]
    table(("quota", "used", "of"), rows)


COMMANDS = {
    "keys": Group(
        "Create, list, change, rotate and revoke API keys. The server's own key (its ERA_API_KEY) must be in "
        "ERA_API_KEY here too, or one with the scope 'admin'.",
        {
            "create": Command(
                "Create a key for OWNER and print it. It is not shown again: the server keeps only its digest.",
                calls(_create, _show_new),
                [
                    'era keys create mina --description "her laptop"',
                    "era keys create ci --scope run --scope read --expires 2030-01-31T12:00:00Z --quota sessions=10",
                ],
                [
                    argument(
                        "owner", metavar="OWNER", help="a key gives access to its owner's sessions and storage only"
                    ),
                    *_fields(_QUOTAS_HELP),
                ],
                summary="create a key for an owner",
            ),
            "list": Command(
                "List the keys: id, creation time, owner, description, scopes, end.",
                lists(
                    lambda era, _: era.keys.list(),
                    "keys",
                    {
                        "id": "id",
                        "created": "created_at",
                        "owner": "owner",
                        "description": "description",
                        "scopes": lambda key: ",".join(key.scopes or ()),
                        "ends": lambda key: key.expires_at or "never",
                    },
                ),
                ["era keys list"],
                summary="list the keys",
            ),
            "change": Command(
                "Change a key's description, scopes, end or quotas. It holds from the next call on.",
                calls(_change),
                [
                    "era keys change KEY_ID --scope read",
                    "era keys change KEY_ID --expires never --quota runs_per_minute=none",
                ],
                [_KEY, *_fields(f"{_QUOTAS_HELP}; NAME=none takes one back")],
                summary="change what a key is good for",
            ),
            "rotate": Command(
                "Give a key another secret and print it. The one before stays good for a while.",
                calls(lambda era, named: era.keys.rotate(named.key, named.grace), _show_new),
                ["era keys rotate KEY_ID", "era keys rotate KEY_ID --grace 86400"],
                [
                    _KEY,
                    argument(
                        "--grace",
                        type=seconds,
                        default=3600,
                        metavar="SECONDS",
                        help="how long the one before stays good (3600)",
                    ),
                ],
                summary="give a key another secret",
            ),
            "revoke": Command(
                "Revoke a key. Calls with it are refused at once. Its owner's sessions and storage stay.",
                does(lambda era, named: era.keys.revoke(named.key), id="key"),
                ["era keys revoke KEY_ID"],
                [_KEY],
                summary="revoke a key",
            ),
        },
    ),
    "quotas": Command(
        "Show your quotas and what is used of them; an owner's, or set those, as the server's operator.",
        calls(_quotas, _show),
        ["era quotas", "era quotas mina", "era quotas mina --set sessions=100 --set runs_per_minute=none"],
        [
            argument("owner", metavar="OWNER", nargs="?", help="whose; needs the operator's key"),
            argument(
                "--set",
                action="append",
                metavar="NAME=N",
                help="set a quota, 0 for no bound; NAME=none has the server's default hold again",
            ),
        ],
    ),
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
    ),
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
    ),
}
