"""`era keys`: the API keys that a server has given out."""

from __future__ import annotations

import sys
from urllib.parse import quote

from cyclopts import App

from era.client.calls import call, connect
from era.client.options import DEFAULT_SERVER, Server

keys = App(
    name="keys",
    help="Create, list and revoke API keys.\n\nThe server's own key (its ERA_API_KEY) must be in ERA_API_KEY here too.",
)


@keys.command
def create(owner: str, /, *, description: str = "", server: Server = DEFAULT_SERVER) -> None:
    """Create a key for OWNER and print it.

    It is not shown again: the server keeps only its digest.

    Example:

        era keys create mina --description "her laptop"

    Parameters
    ----------
    owner
        Whose key it is. A key gives access to its owner's sessions and storage only.
    description
        What it is for.
    server
        The server's address.
    """
    with connect(server) as client:
        answer = call(client, "POST", "/api/keys", {"owner": owner, "description": description})
    print(f"{answer['id']} is a key of {answer['owner']}'s. It is not shown again:", file=sys.stderr)
    print(answer["key"])


@keys.command(name="list")
def list_(*, server: Server = DEFAULT_SERVER) -> None:
    """List the keys: id, creation time, owner, description.

    Example:

        era keys list

    Parameters
    ----------
    server
        The server's address.
    """
    with connect(server) as client:
        answer = call(client, "GET", "/api/keys")
    for key in answer["keys"]:
        print(f"{key['id']}  {key['created_at']}  {key['owner']}  {key['description']}".rstrip())


@keys.command
def revoke(key_id: str, /, *, server: Server = DEFAULT_SERVER) -> None:
    """Revoke a key.

    Calls with it are refused at once. Its owner's sessions and storage stay.

    Example:

        era keys revoke KEY_ID

    Parameters
    ----------
    key_id
        As `era keys list` shows it.
    server
        The server's address.
    """
    with connect(server) as client:
        call(client, "DELETE", f"/api/keys/{quote(key_id, safe='')}")
