# Made by scripts/blocking.py of src/era/sdk/aio/versions.py: change that one.
"""A session's past."""

from __future__ import annotations

from era.sdk.answers import Diff, SessionInfo, Version
from era.sdk.sync.connection import Connection
from era.sdk.sync.files import Files

type _Versions = list[Version]


class Versions:
    """The versions of a session that are kept: data and files as they were."""

    def __init__(self, connection: Connection, path: str) -> None:
        self._connection = connection
        self._session = path
        self._path = f"{path}/versions"

    def list(self, limit: int | None = None) -> _Versions:
        """Versions, newest first: all, or the newest `limit`."""
        return Version.each(self._connection.pages(self._path, "versions", limit))

    def get(self, version: int) -> Version:
        """One version, with its data."""
        return Version(self._connection.get(f"{self._path}/{version}"))

    def diff(self, version: int) -> Diff:
        """What a version changed, compared with the one before it."""
        return Diff(self._connection.get(f"{self._path}/{version}/diff"))

    def files(self, version: int) -> Files:
        """The files of a version, which can be listed and read."""
        return Files(self._connection, f"{self._path}/{version}")

    def name(self, version: int, name: str) -> Version:
        """Name a version, so that it is kept."""
        return Version(self._connection.send("PUT", f"{self._path}/{version}/name", {"name": name}))

    def unname(self, version: int) -> None:
        """Take a version its name. If it was kept for that only, it goes."""
        self._connection.send("DELETE", f"{self._path}/{version}/name")

    def rollback(self, version: int, *, stop: bool = False) -> SessionInfo:
        """Make a new version with the content of an old one. While processes or contexts run this raises SessionLive;
        with `stop`, they are ended first."""
        seconds = self._connection.turn_seconds
        fields = {"version": version, **({"stop": True} if stop else {})}
        answer = self._connection.send("POST", f"{self._session}/rollback", fields, seconds)
        return SessionInfo(answer)
