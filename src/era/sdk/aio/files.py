"""A session's files."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Literal

from era.common.urls import file_part
from era.errors import Conflict, NotFound
from era.sdk.aio.connection import AsyncConnection
from era.sdk.aio.streams import AsyncEventStream
from era.sdk.answers import FileInfo
from era.sdk.calls import Advance, Archive, Call, Content, Query, archive_of, content_of
from era.sdk.events import FileEvent
from era.sdk.sugar import AsyncFilesSugar
from era.sdk.waiting import async_in_thread

if TYPE_CHECKING:
    from era.sdk.directories import Synced

type _Files = list[FileInfo]
type _Paths = list[str]


class AsyncFiles(AsyncFilesSugar):
    """A session's files by path. Paths are relative and separated by `/`."""

    def __init__(self, connection: AsyncConnection, path: str) -> None:
        """`path` is that of the session, or of one of its versions."""
        self._connection = connection
        self._session = path
        self._path = f"{path}/files"

    async def read(self, path: str) -> bytes:
        """A file's content. Raises NotFound."""
        return await self._connection.content(f"{self._path}/{file_part(path)}")

    async def text(self, path: str) -> str:
        """A file's content as text (UTF-8)."""
        return (await self.read(path)).decode()

    async def pieces(self, path: str) -> AsyncIterator[bytes]:
        """A file's content, piece by piece."""
        async for piece in self._connection.pieces(Call("GET", f"{self._path}/{file_part(path)}")):
            yield piece

    async def write(self, path: str, content: Content, *, progress: Advance | None = None) -> None:
        """Put a file, in the place of any other. Directories on the way are made.

        `content` is bytes, text, the path of a local file (a pathlib.Path) or an open binary file.
        """
        body = content_of(content, progress)
        await self._change("PUT", f"{self._path}/{file_part(path)}", content=body)

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, or with `recursive` a directory and all that is in it. Raises NotFound."""
        query = {"recursive": True} if recursive else None
        await self._change("DELETE", f"{self._path}/{file_part(path)}", query=query)

    async def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        try:
            return (await self.stat(path)).type != "dir"
        except NotFound as error:
            if error.code != "no_file":
                raise
        return False

    async def list(self, prefix: str = "") -> _Files:
        """All files whose paths begin with `prefix`, in the order of their paths."""
        query = {"prefix": prefix} if prefix else None
        return FileInfo.each(await self._connection.pages(self._path, "files", query=query))

    async def stat(self, path: str) -> FileInfo:
        """What is at a path: a file, a link or a directory. Raises NotFound."""
        return FileInfo(await self._connection.get(f"{self._session}/stat/{file_part(path)}"))

    async def move(self, path: str, to: str, *, replace: bool = False) -> None:
        """Move a file, link or directory. Raises Conflict if something is there already."""
        body = {"from": path, "to": to, **({"replace": True} if replace else {})}
        await self._change("POST", f"{self._session}/move", json=body)

    async def mkdir(self, path: str) -> None:
        """Make a directory, and those on the way to it."""
        await self._change("POST", f"{self._session}/mkdir", json={"path": path})

    async def link(self, path: str, *, method: Literal["GET", "PUT"] = "GET", expires_in: int | None = None) -> str:
        """A URL by which this one file can be read, or written, without a key, for so many seconds (3,600)."""
        body = {"path": path, "method": method, **({} if expires_in is None else {"expires_in": expires_in})}
        return str((await self._connection.send("POST", f"{self._session}/links", body))["url"])

    async def download(self, path: str, target: str | os.PathLike[str], *, progress: Advance | None = None) -> None:
        """Write a file's content into a local file: all of it, or nothing. Raises LocalError."""
        await self._save(Call("GET", f"{self._path}/{file_part(path)}"), target, progress)

    async def watch(self, path: str = "", *, recursive: bool = False) -> AsyncIterator[FileEvent]:
        """What changes in a session's files from now on, without end.

        It begins with `watching`. Where the connection broke, or the session has become live, there is another one,
        behind which comes what has changed meanwhile, or a `gap`. Raises Conflict when the session isn't live any more.
        """
        query: Query = {"path": path, "recursive": recursive}
        watch = f"{self._session}/watch"
        answer = await self._connection.open(Call("GET", watch, query=query))
        stream = AsyncEventStream(self._connection, watch, answer, last=None, query=query)
        try:
            async for event in stream.events():
                yield FileEvent(event)
        finally:
            await stream.close()

    async def archive(
        self, target: str | os.PathLike[str], *, format: str = "tar", progress: Advance | None = None
    ) -> None:
        """Write all files into a local archive: `tar`, `tar.gz` or `zip`. Raises LocalError."""
        await self._save(Call("GET", f"{self._session}/archive", query={"format": format}), target, progress)

    async def extract(self, archive: Archive, *, replace: bool = False, progress: Advance | None = None) -> None:
        """Add the content of an archive, all or nothing; with `replace`, in the place of all files."""
        query = {"replace": True} if replace else None
        body = archive_of(archive, progress)
        await self._change("PUT", f"{self._session}/archive", query=query, content=body)

    async def push(
        self, directory: str | os.PathLike[str], *, delete: bool = False, progress: Advance | None = None
    ) -> Synced:
        """Copy a local directory into the session: what differs, all or nothing.

        What .gitignore files leave out stays here, and so do `.git` and links. `delete` removes what is only there, but
        for the session's own `.git`.
        """
        from era.sdk import directories  # it is for those who have local files, and takes long to import

        digests: dict[str, str] = await async_in_thread(directories.digests, directory)
        remote = {file.path: file for file in await self.list()}
        changed = sorted(path for path, digest in digests.items() if path not in remote or remote[path].etag != digest)
        if changed:
            archive: Any = await async_in_thread(directories.archive_of, directory, changed)
            with archive:
                body = content_of(archive.path, progress)
                await self._change("PUT", f"{self._session}/archive", content=body)
        surplus = sorted(remote.keys() - digests.keys()) if delete else []
        # What git has there isn't the directory's, and no request can name what isn't UTF-8.
        deleted = [path for path in surplus if "\ufffd" not in path and not directories.is_gits(path)]
        for path in deleted:
            await self.remove(path)
        return directories.Synced(changed, deleted, len(digests), len(surplus) - len(deleted))

    async def pull(
        self, directory: str | os.PathLike[str], *, delete: bool = False, progress: Advance | None = None
    ) -> Synced:
        """Copy the session's files into a local directory: what differs. Links and `.git` are left out.

        Nothing outside of the directory is ever written, whatever the files are called. `delete` removes what is only
        here, but for what .gitignore files leave out.
        """
        from era.sdk import directories

        remote = {file.path: file for file in await self.list()}
        # U+FFFD stands for bytes of a name that aren't UTF-8, which no request can name.
        plain = {
            path: file
            for path, file in remote.items()
            if file.type == "file" and "\ufffd" not in path and not directories.is_left_out(path)
        }
        with directories.Directory(directory) as local:
            changed: _Paths = await async_in_thread(local.different, {path: f.etag for path, f in plain.items()})
            for path in changed:
                try:
                    with local.writing(path, progress) as write:
                        async for piece in self.pieces(path):
                            write(piece)
                except Conflict as error:
                    if error.code != "no_permission":  # which a live session's programs can take from themselves
                        raise
                    del plain[path]
            surplus = [path for path in directories.files(directory) if path not in remote] if delete else []
            for path in surplus:
                local.remove(path)
        copied = [path for path in changed if path in plain]
        return directories.Synced(copied, surplus, len(plain), len(remote) - len(plain))

    async def _change(self, method: str, path: str, **options: Any) -> None:
        await self._connection.call(Call(method, path, seconds=self._connection.files_seconds, **options))

    async def _save(self, call: Call, target: str | os.PathLike[str], progress: Advance | None) -> None:
        from era.sdk import directories

        with directories.replacing(target, progress) as write:
            async for piece in self._connection.pieces(call):
                write(piece)
