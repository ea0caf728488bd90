"""`era quotas`: how much owners may use, and how much is used now."""

from __future__ import annotations

from typing import Any

from era.client.grammar import Parser
from era.client.keys import quotas_of
from era.client.output import print_json, table
from era.client.servers import connect
from era.sdk.answers import Owner


def add(parser: Parser) -> None:
    parser.describe(
        quotas,
        "Show your quotas and what is used of them; an owner's, or set those, as the server's operator.",
        ("era quotas", "era quotas mina", "era quotas mina --set sessions=100 --set runs_per_minute=none"),
    )
    parser.add_argument("owner", metavar="OWNER", nargs="?", help="whose; needs the operator's key")
    parser.add_argument(
        "--set",
        action="append",
        metavar="NAME=N",
        help="set a quota, 0 for no bound; NAME=none has the server's default hold again",
    )


def quotas(named: Any) -> None:
    with connect(named) as era:
        if named.owner is None and not named.set:
            owner = era.quotas()
        elif named.set:
            owner = era.owners.set_quotas(named.owner or era.quotas().owner, **quotas_of(named.set))
        else:
            owner = era.owners.get(named.owner)
    if named.json:
        print_json(owner.answer)
    else:
        _print(owner)


def _print(owner: Owner) -> None:
    rows = [(name, f"{owner.used.get(name, 0):g}", most or "no bound") for name, most in owner.quotas.items()]
    table(("quota", "used", "of"), rows)
