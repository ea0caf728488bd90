"""`era keys`: the API keys that a server has given out."""

from __future__ import annotations

from typing import Any

from era.client.grammar import Parser
from era.client.output import notice, print_json, table
from era.client.servers import connect


def add(parser: Parser) -> None:
    command = parser.group(
        "Create, list and revoke API keys. The server's own key (its ERA_API_KEY) must be in ERA_API_KEY here too."
    )
    each = command("create", "create a key for an owner")
    each.describe(
        create,
        "Create a key for OWNER and print it. It is not shown again: the server keeps only its digest.",
        ('era keys create mina --description "her laptop"',),
    )
    each.add_argument("owner", metavar="OWNER", help="a key gives access to its owner's sessions and storage only")
    each.add_argument("--description", default="", help="what it is for")
    each = command("list", "list the keys")
    each.describe(list_, "List the keys: id, creation time, owner, description.", ("era keys list",))
    each = command("revoke", "revoke a key")
    each.describe(
        revoke,
        "Revoke a key. Calls with it are refused at once. Its owner's sessions and storage stay.",
        ("era keys revoke KEY_ID",),
    )
    each.add_argument("key", metavar="KEY_ID", help="as `era keys list` shows it")


def create(named: Any) -> None:
    with connect(named) as era:
        key = era.keys.create(named.owner, named.description)
    if named.json:
        print_json(key.answer)
        return
    notice(f"{key.id} is a key of {key.owner}'s. It is not shown again:")
    print(key.key)


def list_(named: Any) -> None:
    with connect(named) as era:
        found = era.keys.list()
    if named.json:
        print_json({"keys": [key.answer for key in found], "count": len(found)})
    else:
        table(("id", "created", "owner", "description"), [(k.id, k.created_at, k.owner, k.description) for k in found])


def revoke(named: Any) -> None:
    with connect(named) as era:
        era.keys.revoke(named.key)
    if named.json:
        print_json({"success": True, "id": named.key})
