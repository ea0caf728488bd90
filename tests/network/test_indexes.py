"""What a build can get from the indexes of the host's tools, and what it can't."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from era.core.ports import Sandbox
from era.network import http1, indexes
from era.network.indexes import IndexListeners
from tests.packages.registry import Registry, serving

PAGE = """<!DOCTYPE html><base href="/files/"><A class="x" href='a-1.0.tar.gz#sha256=12' data-requires-python="&gt;=3"
>a-1.0.tar.gz</a> <a href="http://OTHER/files/b%201.whl?token=1&amp;x=2">b</a> <a href="file:///etc/passwd">c</a>"""


@pytest.fixture
def registry() -> Iterator[Registry]:
    with serving() as registry:
        registry.pages["/simple/a/"] = PAGE.replace("OTHER", registry.url.removeprefix("http://")).encode()
        registry.pages["/files/a-1.0.tar.gz"] = bytes(range(256)) * 5000
        registry.pages["/files/a-1.0.tar.gz.metadata"] = b"Name: a"
        registry.pages["/files/b%201.whl?token=1&x=2"] = b"wheel"
        registry.pages["/secret"] = registry.pages["/simple/secret"] = b"secret"
        yield registry


def answers(registry: Registry, *requests: bytes) -> list[bytes]:
    """What each of these requests gets."""

    async def ask(port: int, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        responses = b""
        try:
            while data := await reader.read(1 << 16):
                responses += data
        except ConnectionResetError:
            responses += b"RESET"
        writer.close()
        return responses

    async def job() -> list[bytes]:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            sandbox = cast(Sandbox, SimpleNamespace(guest_listeners={"storage": cast(Any, listener)}))
            access = IndexListeners().access(sandbox, [f"{registry.url}/simple", f"{registry.url}/nowhere/"])
            port = listener.getsockname()[1]
            assert access.filled_in("{0} {1} {2}") == f"http://127.0.0.1:{port}/0 http://127.0.0.1:{port}/1 {{2}}"
            async with access:
                responses = [await ask(port, request) for request in requests]
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)
            return responses

    return asyncio.run(job())


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def test_pages_and_the_files_they_name(registry: Registry) -> None:
    page, first, metadata, second = answers(
        registry, get("/0/a/"), get("/file/0/a-1.0.tar.gz"), get("/file/0/a-1.0.tar.gz.metadata"), get("/file/1/x.whl")
    )
    head, _, body = page.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"/file/0/a-1.0.tar.gz#sha256=12" in body
    assert b'data-requires-python="&gt;=3"' in body
    assert b"file:" not in body
    assert registry.url.encode() not in body
    content = first.partition(b"\r\n\r\n")[2]
    assert hashlib.sha256(content).digest() == hashlib.sha256(registry.pages["/files/a-1.0.tar.gz"]).digest()
    assert metadata.endswith(b"\r\n\r\nName: a")
    assert second.endswith(b"\r\n\r\nwheel")


@pytest.mark.parametrize("framing", [b"Content-Length: 900000", b"Transfer-Encoding: chunked"])
def test_a_file_that_breaks_off_does_not_pass_for_a_whole_one(registry: Registry, framing: bytes) -> None:
    """Nor for one with an error at its end. Where it has no length, only the connection's end says that it's whole."""

    class Broken(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)
            self.request.sendall(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n61a80\r\n" + bytes(300_000))

    with socketserver.TCPServer(("127.0.0.1", 0), Broken) as broken:
        threading.Thread(target=broken.serve_forever, args=(0.05,), daemon=True).start()
        link = f'<a href="http://127.0.0.1:{broken.server_address[1]}/a-1.0.tar.gz">a</a>'
        registry.pages["/simple/a/"] = link.encode()
        _, content = answers(registry, get("/0/a/"), get("/file/0/a-1.0.tar.gz"))
        broken.shutdown()
    assert content.endswith(b"RESET")
    assert b"HTTP/1.1 502" not in content


HOSTILE = (
    get("/0/.."), get("/0/../"), get("/0/."), get("/0/./"), get("/0/..."),
    get("/0/../secret/"), get("/0/%2e%2e/secret"), get("/0/secret?x"), get("/0/..%2fsecret/"), get("/2/a/"),
    get("/file/7/x"), get("/file/-1/x"), get("/file/0/../../../secret"), get("/secret"), get("//REGISTRY/secret"),
    get("http://REGISTRY/secret"), get("/0/http://REGISTRY/secret"), get("/0/a/\r\nX: /secret"), get("/1/a/"),
    b"CONNECT REGISTRY HTTP/1.1\r\n\r\n", b"POST /0/a/ HTTP/1.1\r\nContent-Length: 1\r\n\r\nx", b"\0\r\n\r\n",
    b"GET /0/a/" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
)  # fmt: skip


def test_nothing_else_can_be_fetched(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    place = registry.url.removeprefix("http://").encode()
    requests = [request.replace(b"REGISTRY", place) for request in HOSTILE]
    responses = answers(registry, get("/0/a/"), *requests)
    assert not [answer for answer in responses if b"secret" in answer]
    assert responses[0][9:12] == b"200"
    assert [answer[:100] for answer in responses[1:] if answer[9:10] != b"4"] == []
    asked = {path for path in registry.asked if "secret" in path}
    assert asked <= {"/simple/secret/"}, "nothing but pages of the index"
    assert {"/", "/simple/", "/simple"}.isdisjoint(registry.asked), "nor a directory that isn't a package's"
    monkeypatch.setattr(indexes.IndexListener, "_answer", lambda self, writer, path: self._send_file(writer, path))
    weak = answers(registry, *requests)
    assert [answer for answer in weak if b"secret" in answer], "it would be, if links were not numbers"


def test_one_page_names_no_more_files_than_all_may(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes, "_MAX_FILES", 3)
    registry.pages["/simple/many/"] = b"".join(b'<a href="/files/%d.whl">x</a>' % n for n in range(10))
    first, many, again = answers(registry, get("/0/a/"), get("/0/many/"), get("/0/a/"))
    assert [first[9:12], many[9:12], again[9:12]] == [b"200", b"429", b"200"]


def test_a_head_that_does_not_end_is_cut_off(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "HEAD_SECONDS", 0.2)
    (responses,) = answers(registry, b"GET /0/a/ HTTP/1.1\r\nA: b")
    assert responses.startswith(b"HTTP/1.1 408 ")
