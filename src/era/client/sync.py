"""`era push` and `era pull`: a directory into a session and back, changed files only.

Whether a file is the same on both sides is decided by the SHA-256 of its content, which is the ETag in the list of a
session's files.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from era.client.options import DEFAULT_SERVER, Server
from era.client.transfers import progress
from era.sdk.sync.client import Era


def push(
    directory: Path,
    /,
    *,
    session: Annotated[str, Parameter(alias="-s")],
    delete: bool = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Copy the files of DIRECTORY into a session.

    Only those that differ there or are missing are sent, and they arrive all or none. What .gitignore files leave out
    stays here, and so do `.git` and links.

    Examples:

        era push . --session app
        era push src --session app --delete

    Parameters
    ----------
    directory
        The project.
    session
        The session's id.
    delete
        Delete what the session has and DIRECTORY hasn't.
    server
        The server's address.
    """
    with Era(server) as era, progress(f"push {session}", None) as advance:
        done = era.sessions.get(session).files.push(directory, delete=delete, progress=advance)
    print(f"{len(done.copied)} files pushed, {len(done.deleted)} deleted, {done.total} in all")


def pull(
    directory: Path,
    /,
    *,
    session: Annotated[str, Parameter(alias="-s")],
    delete: bool = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Copy a session's files into DIRECTORY.

    Only those that differ here or are missing are fetched. Nothing outside of DIRECTORY is ever written, whatever the
    session's files are called. Links are not pulled.

    Examples:

        era pull results --session app
        era pull . --session app --delete

    Parameters
    ----------
    directory
        Where to; made if it doesn't exist.
    session
        The session's id.
    delete
        Delete what DIRECTORY has and the session hasn't, but for what its .gitignore files leave out.
    server
        The server's address.
    """
    with Era(server) as era, progress(f"pull {session}", None) as advance:
        done = era.sessions.get(session).files.pull(directory, delete=delete, progress=advance)
    print(f"{len(done.copied)} files pulled, {len(done.deleted)} deleted, {done.total} in all")
    if done.left_out:
        print(f"era: {done.left_out} links, or names that aren't UTF-8, were not pulled", file=sys.stderr)
