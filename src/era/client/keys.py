"""`era keys`: the API keys that a server has given out."""

from __future__ import annotations

from typing import Any

from era.client.argument_values import seconds
from era.client.failure import Failure
from era.client.grammar import Parser
from era.client.output import notice, print_json, table
from era.client.servers import connect
from era.sdk.answers import ApiKey

_QUOTAS_HELP = "a quota of its own, such as runs_per_minute=60; may be given again"


def add(parser: Parser) -> None:
    command = parser.group(
        "Create, list, change, rotate and revoke API keys. The server's own key (its ERA_API_KEY) must be in "
        "ERA_API_KEY here too, or one with the scope 'admin'."
    )
    each = command("create", "create a key for an owner")
    each.describe(
        create,
        "Create a key for OWNER and print it. It is not shown again: the server keeps only its digest.",
        (
            'era keys create mina --description "her laptop"',
            "era keys create ci --scope run --scope read --expires 2030-01-31T12:00:00Z --quota sessions=10",
        ),
    )
    each.add_argument("owner", metavar="OWNER", help="a key gives access to its owner's sessions and storage only")
    _add_fields(each, quotas=_QUOTAS_HELP)
    each = command("list", "list the keys")
    each.describe(list_, "List the keys: id, creation time, owner, description, scopes, end.", ("era keys list",))
    each = command("change", "change what a key is good for")
    each.describe(
        change,
        "Change a key's description, scopes, end or quotas. It holds from the next call on.",
        ("era keys change KEY_ID --scope read", "era keys change KEY_ID --expires never --quota runs_per_minute=none"),
    )
    _add_key(each)
    _add_fields(each, quotas=f"{_QUOTAS_HELP}; NAME=none takes one back")
    each = command("rotate", "give a key another secret")
    each.describe(
        rotate,
        "Give a key another secret and print it. The one before stays good for a while.",
        ("era keys rotate KEY_ID", "era keys rotate KEY_ID --grace 86400"),
    )
    _add_key(each)
    each.add_argument(
        "--grace", type=seconds, default=3600, metavar="SECONDS", help="how long the one before stays good (3600)"
    )
    each = command("revoke", "revoke a key")
    each.describe(
        revoke,
        "Revoke a key. Calls with it are refused at once. Its owner's sessions and storage stay.",
        ("era keys revoke KEY_ID",),
    )
    _add_key(each)


def _add_key(parser: Parser) -> None:
    parser.add_argument("key", metavar="KEY_ID", help="as `era keys list` shows it")


def _add_fields(parser: Parser, quotas: str) -> None:
    parser.add_argument("--description", help="what it is for")
    parser.add_argument(
        "--scope", action="append", metavar="SCOPE", help="read, run, write or admin; may be given again"
    )
    parser.add_argument("--expires", metavar="TIME", help="when it ends, such as 2030-01-31T12:00:00Z, or never")
    parser.add_argument("--quota", action="append", metavar="NAME=N", help=quotas)


def create(named: Any) -> None:
    with connect(named) as era:
        key = era.keys.create(
            named.owner,
            named.description or "",
            scopes=named.scope,
            expires_at=_end(named.expires),
            quotas=quotas_of(named.quota) if named.quota else None,
        )
    _print_new(named, key)


def list_(named: Any) -> None:
    with connect(named) as era:
        found = era.keys.list()
    if named.json:
        print_json({"keys": [key.answer for key in found], "count": len(found)})
    else:
        table(
            ("id", "created", "owner", "description", "scopes", "ends"),
            [
                (k.id, k.created_at, k.owner, k.description, ",".join(k.scopes or ()), k.expires_at or "never")
                for k in found
            ],
        )


def change(named: Any) -> None:
    changes: dict[str, Any] = {"description": named.description, "scopes": named.scope}
    changes = {name: value for name, value in changes.items() if value is not None}
    if named.expires is not None:
        changes["expires_at"] = _end(named.expires)
    if named.quota:
        changes["quotas"] = quotas_of(named.quota)
    if not changes:
        raise Failure("Nothing is to be changed.\n     Say what: --description, --scope, --expires or --quota.")
    with connect(named) as era:
        key = era.keys.change(named.key, **changes)
    if named.json:
        print_json(key.answer)


def rotate(named: Any) -> None:
    with connect(named) as era:
        key = era.keys.rotate(named.key, named.grace)
    _print_new(named, key)


def revoke(named: Any) -> None:
    with connect(named) as era:
        era.keys.revoke(named.key)
    if named.json:
        print_json({"success": True, "id": named.key})


def quotas_of(words: list[str]) -> dict[str, int | None]:
    """Quotas by name, of words like `sessions=10`; `none` takes one back. Raises Failure."""
    found: dict[str, int | None] = {}
    for word in words:
        name, _, value = word.partition("=")
        if not name or not (value == "none" or value.isdecimal()):
            raise Failure(f"'{word[:80]}' is no quota.\n     Write NAME=N, such as sessions=10, or NAME=none.")
        found[name] = None if value == "none" else int(value)
    return found


def _end(word: str | None) -> str | None:
    """When a key ends, None for never."""
    return None if word == "never" else word


def _print_new(named: Any, key: ApiKey) -> None:
    if named.json:
        print_json(key.answer)
        return
    notice(f"{key.id} is a key of {key.owner}'s. It is not shown again:")
    print(key.key)
