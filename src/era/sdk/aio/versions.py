"""A session's past."""

from __future__ import annotations

from era.sdk.aio.connection import AsyncConnection
from era.sdk.aio.files import AsyncFiles
from era.sdk.answers import Diff, SessionInfo, Version

type _Versions = list[Version]


class AsyncVersions:
    """The versions of a session that are kept: data and files as they were."""

    def __init__(self, connection: AsyncConnection, path: str) -> None:
        self._connection = connection
        self._session = path
        self._path = f"{path}/versions"

    async def list(self, limit: int | None = None) -> _Versions:
        """Versions, newest first: all, or the newest `limit`."""
        return Version.each(await self._connection.pages(self._path, "versions", limit))

    async def get(self, version: int) -> Version:
        """One version, with its data."""
        return Version(await self._connection.get(f"{self._path}/{version}"))

    async def diff(self, version: int) -> Diff:
        """What a version changed, compared with the one before it."""
        return Diff(await self._connection.get(f"{self._path}/{version}/diff"))

    def files(self, version: int) -> AsyncFiles:
        """The files of a version, which can be listed and read."""
        return AsyncFiles(self._connection, f"{self._path}/{version}")

    async def name(self, version: int, name: str) -> Version:
        """Name a version, so that it is kept."""
        return Version(await self._connection.send("PUT", f"{self._path}/{version}/name", {"name": name}))

    async def unname(self, version: int) -> None:
        """Take a version its name. If it was kept for that only, it goes."""
        await self._connection.send("DELETE", f"{self._path}/{version}/name")

    async def rollback(self, version: int, *, stop: bool = False) -> SessionInfo:
        """Make a new version with the content of an old one. While processes or contexts run this raises SessionLive;
        with `stop`, they are ended first."""
        seconds = self._connection.turn_seconds
        fields = {"version": version, **({"stop": True} if stop else {})}
        answer = await self._connection.send("POST", f"{self._session}/rollback", fields, seconds)
        return SessionInfo(answer)
