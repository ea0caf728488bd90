"""`era export` and `era import`: a session as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from era.client.calls import checked, connect, stream
from era.client.options import DEFAULT_SERVER, Server
from era.client.transfers import download, upload
from era.urls import session_path


def export(
    session: str,
    /,
    *,
    output: Annotated[Path | None, Parameter(alias="-o", allow_leading_hyphen=True)] = None,
    current: Annotated[bool, Parameter(negative="")] = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Write SESSION, with all that belongs to it, into one file.

    Examples:

        era export counter
        era export counter --current --output counter.tar
        era export counter --output - | ssh elsewhere era import -

    Parameters
    ----------
    session
        The session's id.
    output
        The file; `-` for standard output. Default: SESSION.era.tar.
    current
        Leave out its past: older versions and the records of runs.
    server
        The server's address.
    """
    target = Path(f"{session}.era.tar") if output is None else output
    to_stdout = target == Path("-")
    query = {"versions": "current"} if current else {}
    path = f"{session_path(session)}/capsule"
    with connect(server) as client, stream(client, "GET", path, params=query) as response:
        size = download(response, None if to_stdout else target, f"export {session}")
    if not to_stdout:
        print(f"{target}  {size} bytes")


def import_(
    file: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    id: Annotated[str | None, Parameter(name="--id")] = None,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Create the session that a file from `era export` holds.

    Prints the session's id.

    Examples:

        era import counter.era.tar
        era import counter.era.tar --id counter-again

    Parameters
    ----------
    file
        The file; `-` for standard input.
    id
        The new session's id. Default: the one it had.
    server
        The server's address.
    """
    query = {} if id is None else {"id": id}
    with connect(server) as client, upload(None if file == "-" else Path(file), f"import {file}") as body:
        session = checked(client.post("/api/sessions/import", params=query, **body))
    print(session["id"])
