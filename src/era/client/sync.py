"""`era push` and `era pull`: a directory into a session and back, changed files only.

Whether a file is the same on both sides is decided by the SHA-256 of its content, which is the ETag in the list of a
session's files.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from era.client import directories
from era.client.calls import checked, connect, stream
from era.client.failure import Failure
from era.client.options import DEFAULT_SERVER, Server
from era.client.transfers import progress, upload
from era.urls import file_path, session_path

if TYPE_CHECKING:
    import httpx


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
    if not directory.is_dir():
        raise Failure(f"{directory} is no directory.")
    with directories.Directory(directory) as local:
        digests = {path: local.digest(path) for path in directories.files(directory)}
    if unread := [path for path, digest in digests.items() if digest is None]:
        raise Failure(f"{directory / unread[0]} can't be read.")
    with connect(server) as client:
        remote = _session_files(client, session)
        changed = sorted(
            path for path, digest in digests.items() if path not in remote or remote[path]["etag"] != digest
        )
        if changed:
            with directories.temporary_tar(directory, changed) as archive, upload(archive, f"push {session}") as body:
                checked(client.put(f"{session_path(session)}/archive", **body))
        surplus = sorted(remote.keys() - digests.keys()) if delete else []
        for path in surplus:
            checked(client.delete(file_path(session, path)))
    print(f"{len(changed)} files pushed, {len(surplus)} deleted, {len(digests)} in all")


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
    with connect(server) as client:
        remote = _session_files(client, session)
        # Links have no ETag. U+FFFD stands for bytes of a name that aren't UTF-8, which no request can name.
        plain = {path: file for path, file in remote.items() if file["etag"] and "\ufffd" not in path}
        with directories.Directory(directory) as local:
            changed = sorted(path for path, file in plain.items() if local.digest(path) != file["etag"])
            with progress(f"pull {session}", sum(plain[path]["size"] for path in changed)) as advance:
                for path in changed:
                    with stream(client, "GET", file_path(session, path)) as response:
                        local.write(path, response.iter_bytes(), advance)
            surplus = [path for path in directories.files(directory) if path not in remote] if delete else []
            for path in surplus:
                local.remove(path)
    print(f"{len(changed)} files pulled, {len(surplus)} deleted, {len(plain)} in all")
    if left := len(remote) - len(plain):
        print(f"era: {left} links, or names that aren't UTF-8, were not pulled", file=sys.stderr)


def _session_files(client: httpx.Client, session: str) -> dict[str, dict[str, Any]]:
    """All of a session's files as the API lists them, by path."""
    files: dict[str, dict[str, Any]] = {}
    query: dict[str, str] = {}
    while True:
        page = checked(client.get(f"{session_path(session)}/files", params=query))
        files |= {file["path"]: file for file in page["files"]}
        if page["next_cursor"] is None:
            return files
        query = {"cursor": page["next_cursor"]}
