"""Access from a sandbox to the Python package indexes that the service itself uses, for builds.

Theory of operation. A build needs packages from wherever the operator of the server lets packages come from: that may
be a mirror in a private network, which is closed to programs, and the session may have no internet at all. So nobody is
connected to an index. The service listens at a guest listener of the sandbox while the build lasts, as it does for the
storage (storage.py), and fetches on its behalf.

Two things can be asked for: the page of a package in one of the indexes (PEP 503), and a file that such a page has
named. In a page each link is replaced by a number of our own, so what can be fetched are pages of indexes and what the
indexes themselves point to, and no address that a program makes up. One request is served on each connection, and
nothing behind its head is read. Credentials are not sent.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from html import escape, unescape
from urllib.parse import urldefrag, urljoin

import httpx

from era.core.concurrency.streams import limit_buffer, write, write_eof
from era.core.ports import IndexAccess, Sandbox
from era.errors import SandboxFailed
from era.network.accept_loop import AcceptLoop
from era.network.http1 import CHUNK, Ends, Refused, read_request_head, serve_connection
from era.network.splice import IDLE_SECONDS, reset

_PAGE = re.compile(r"/([0-9]{1,4})/([A-Za-z0-9](?:[A-Za-z0-9._-]{0,198}[A-Za-z0-9])?)/?")
"""An index and a package. No name begins with a dot: `..` would be the directory above."""

_FILE = re.compile(r"/file/([0-9]{1,9})/[A-Za-z0-9._+!%-]{1,300}?(\.metadata)?")
_LINK = re.compile(r"""(<a\s[^<>]*?\bhref\s*=\s*)("[^"]*"|'[^']*')""", re.IGNORECASE)
_BASE = re.compile(r"""<base\s[^<>]*?\bhref\s*=\s*("[^"]*"|'[^']*')[^<>]*>""", re.IGNORECASE)
_MAX_PAGE_BYTES = 64 << 20
_MAX_PAGES, _MAX_REQUESTS = 4, 16
"""Of one build at a time: pages, which take memory, and requests in all."""

_MAX_FILES = 500_000
"""That all pages of one build may name together."""

_ACCEPT = "application/vnd.pypi.simple.v1+html, text/html;q=0.9"


class IndexListeners:
    """See ports.Indexes."""

    def access(self, sandbox: Sandbox, indexes: Sequence[str]) -> IndexAccess:
        return IndexListener(sandbox, indexes) if indexes else NoIndexes()


class NoIndexes:
    """No indexes: none are wanted."""

    def filled_in(self, text: str) -> str:
        return text

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        pass


class IndexListener:
    """Serves a guest listener for one build."""

    def __init__(self, sandbox: Sandbox, indexes: Sequence[str]) -> None:
        """Raises SandboxFailed where the sandbox has no guest listeners."""
        listener = sandbox.guest_listeners.get("storage")
        if listener is None:
            raise SandboxFailed("This kind of sandbox has no way to the registries, so nothing can be built in it.")
        self._indexes = list(indexes)
        self._base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._files: list[str] = []
        self._numbers: dict[str, int] = {}
        self._accept_loop = AcceptLoop(listener, self._serve)
        self._client: httpx.AsyncClient
        self._stack = AsyncExitStack()
        self._requests, self._pages = asyncio.Semaphore(_MAX_REQUESTS), asyncio.Semaphore(_MAX_PAGES)
        self._rewriting = asyncio.Lock()

    def filled_in(self, text: str) -> str:
        """See ports.IndexAccess."""
        for number in range(len(self._indexes)):
            text = text.replace(f"{{{number}}}", f"{self._base_url}/{number}")
        return text

    async def __aenter__(self) -> None:
        context = await asyncio.to_thread(ssl.create_default_context)
        client = httpx.AsyncClient(verify=context, follow_redirects=True, timeout=httpx.Timeout(30.0))
        self._client = await self._stack.enter_async_context(client)
        await self._accept_loop.__aenter__()

    async def __aexit__(self, *_: object) -> None:
        await self._accept_loop.__aexit__()
        await self._stack.aclose()

    async def _serve(self, sock: socket.socket) -> None:
        await serve_connection(sock, self._serve_request)

    async def _serve_request(self, ends: Ends) -> None:
        try:
            path = await _read_path(ends[0])
            async with self._requests:
                await self._answer(ends[1], path)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise Refused(502, "unreachable", f"the registry gave no answer ({type(error).__name__})") from error

    async def _answer(self, writer: asyncio.StreamWriter, path: str) -> None:
        """Answer with the page or the file that a path means. Raises Refused for any other path."""
        if match := _PAGE.fullmatch(path):
            number = int(match[1])
            if number < len(self._indexes):
                async with self._pages:
                    await self._send_page(writer, f"{self._indexes[number].rstrip('/')}/{match[2]}/")
                return
        elif match := _FILE.fullmatch(path):
            number = int(match[1])
            if number < len(self._files):
                await self._send_file(writer, self._files[number] + (match[2] or ""))
                return
        raise Refused(404, "not_found", "there are pages of packages here, and the files that they name")

    async def _send_page(self, writer: asyncio.StreamWriter, url: str) -> None:
        """Fetch a page of an index and send it, with its links replaced. Raises Refused."""
        async with self._fetch(url, Accept=_ACCEPT) as answer:
            if answer.status_code != 200:
                raise _unexpected(answer)
            content = bytearray()
            async for piece in answer.aiter_bytes():
                content += piece
                if len(content) > _MAX_PAGE_BYTES:
                    raise Refused(502, "too_large", "the registry's page is too large")
            base = str(answer.url)
        async with self._rewriting:
            page = await asyncio.to_thread(self._rewritten, content.decode(errors="replace"), base)
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(page)}\r\nConnection: close\r\n\r\n"
        await _send(writer, head.encode() + page)

    def _rewritten(self, page: str, base: str) -> bytes:
        """The page with each link replaced by one to this listener. Raises Refused where there are too many."""
        if match := _BASE.search(page):
            base = urljoin(base, unescape(match[1][1:-1]))

        def numbered(link: re.Match[str]) -> str:
            address, fragment = urldefrag(urljoin(base, unescape(link[2][1:-1])))
            if not address.startswith(("http://", "https://")):
                return f'{link[1]}""'
            number = self._numbers.get(address, len(self._files))
            if number == len(self._files):
                if number >= _MAX_FILES:
                    raise Refused(429, "too_many", "the pages that this build has asked for name too many files")
                self._numbers[address] = number
                self._files.append(address)
            name = address.partition("?")[0].rpartition("/")[2]
            return f'{link[1]}"{escape(f"{self._base_url}/file/{number}/{name}#{fragment}")}"'

        return _LINK.sub(numbered, _BASE.sub("", page)).encode()

    async def _send_file(self, writer: asyncio.StreamWriter, url: str) -> None:
        """Stream a file from an index. Raises Refused."""
        async with self._fetch(url, **{"Accept-Encoding": "identity"}) as answer:
            if answer.status_code != 200 or "content-encoding" in answer.headers:
                raise _unexpected(answer)
            size = answer.headers.get("content-length", "")
            length = f"Content-Length: {size}\r\n" if size.isdigit() else ""
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n{length}Connection: close\r\n\r\n"
            await _send(writer, head.encode())
            try:
                async for piece in answer.aiter_raw(CHUNK):
                    await _send(writer, piece)
            except (httpx.HTTPError, OSError) as error:
                reset(writer.get_extra_info("socket"))  # an end in order would be that of the whole file
                raise ConnectionAbortedError from error
        write_eof(writer)
        limit_buffer(writer.transport, 0)
        await _send(writer, b"")

    @asynccontextmanager
    async def _fetch(self, url: str, **headers: str) -> AsyncIterator[httpx.Response]:
        async with self._client.stream("GET", url, headers=headers) as answer:
            yield answer


async def _read_path(reader: asyncio.StreamReader) -> str:
    """The target of a request. Raises Refused."""
    request = await read_request_head(reader)
    if request.method != b"GET":  # by which uv knows that it can't read a part of a file, so it reads all of it
        raise Refused(405, "only_get", "packages are asked for with GET")
    return request.target.decode("ascii")


async def _send(writer: asyncio.StreamWriter, content: bytes) -> None:
    """Write, and wait until the program has room for it. Without content: until it has taken everything before."""
    async with asyncio.timeout(IDLE_SECONDS):
        for begin in range(0, len(content), CHUNK):
            write(writer, content[begin : begin + CHUNK])
            await writer.drain()
        if not content:
            await writer.drain()


def _unexpected(answer: httpx.Response) -> Refused:
    """The refusal for a registry's answer that is no 200."""
    status = answer.status_code if 400 <= answer.status_code < 600 else 502
    return Refused(status, "registry", f"the registry answered {answer.status_code}")
