"""`era quotas`: how much owners may use, and how much is used now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from era.client.argument_values import quotas_of
from era.client.command import Command, argument, calls
from era.client.output import table

if TYPE_CHECKING:
    from era.sdk.answers import Owner
    from era.sdk.sync.client import Era


def _quotas(era: Era, named: Any) -> Owner:
    if named.set:
        return era.owners.set_quotas(named.owner or era.quotas().owner, **quotas_of(named.set))
    return era.quotas() if named.owner is None else era.owners.get(named.owner)


def _show(owner: Owner) -> None:
    rows = [(name, f"{owner.used.get(name, 0):g}", most or "no bound") for name, most in owner.quotas.items()]
    table(("quota", "used", "of"), rows)


COMMANDS = {
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
    )
}
