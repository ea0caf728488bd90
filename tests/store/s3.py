"""A real S3 server for tests, and one that fails when it is told to.

The server is Ceph's radosgw, which can run alone on a database file. Everything of it lies below a temporary directory.
"""

from __future__ import annotations

import http.client
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import obstore
import pytest
from obstore.store import S3Store

from era.cluster.trial import NEEDED, S3Server, blobs_url, has_s3, make_bucket, s3_bucket
from tests.conftest import free_port

ACCESS_KEY = "ACCESSKEYOFTESTS"
SECRET_KEY = "canary-secret-key-7c1e"


class S3:
    """Where the server is. Each test takes a bucket of its own."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def url(self, bucket: str, prefix: str = "some/prefix", endpoint: str | None = None) -> str:
        return blobs_url(bucket, prefix, endpoint or self.endpoint)

    def make_bucket(self, name: str) -> None:
        make_bucket(self.bucket(name))

    def bucket(self, name: str, prefix: str | None = None) -> S3Store:
        return s3_bucket(name, prefix, self.endpoint, ACCESS_KEY, SECRET_KEY)

    def names(self, bucket: str, prefix: str = "some/prefix") -> list[str]:
        found = obstore.list(self.bucket(bucket, prefix)).collect()
        return sorted(item["path"] for item in found)


class Radosgw(S3):
    """The server itself, which a test may kill and start again."""

    def __init__(self, directory: Path, address: str = "127.0.0.1", prefix: Sequence[str] = ()) -> None:
        """It is to run on a free port of this address. `prefix` is put before its command."""
        self._server = S3Server(directory)
        self._server.initialise(f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}")
        self._place = address, free_port()
        super().__init__("http://{}:{}".format(*self._place))
        self._prefix = prefix

    def start(self) -> None:
        """Start it, and wait until it answers. It ends with this process, however that ends."""
        self._server.start(*self._place, self._prefix)

    def kill(self) -> None:
        self._server.process.stop(signal.SIGKILL)


@contextmanager
def radosgw(directory: Path) -> Iterator[S3]:
    """Run the server until the block ends."""
    server = Radosgw(directory)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """The server. Without radosgw tests that need it are skipped, but not where nobody would notice."""
    if not has_s3():
        pytest.fail(NEEDED["s3"]) if os.environ.get("CI") else pytest.skip(NEEDED["s3"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        with radosgw(tmp_path_factory.mktemp("radosgw")) as server:
            yield server


_numbers = iter(range(10**9))


@pytest.fixture
def bucket(s3: S3) -> str:
    """A new, empty bucket."""
    name = f"bucket{next(_numbers)}"
    s3.make_bucket(name)
    return name


type Fault = Literal["error", "error after", "half", "hang"]


class FaultyS3(ThreadingHTTPServer):
    """Stands before a server and lets the nth request fail, once:

    error        it answers 500 and nothing happens
    error after  it answers 500 though the request was carried out
    half         the answer breaks off in its middle
    hang         no answer comes; the connection is closed after a while
    """

    daemon_threads = True
    request_queue_size = 64
    patience = 1.5

    def __init__(self, s3: S3) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(s3.endpoint).netloc
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self._lock = threading.Lock()
        self._plan: tuple[Fault, int] | None = None
        self._always = False
        self.requests = 0
        self.bytes_per_second = 0
        """How fast it reads the bodies of requests; 0 is as fast as they come."""

        self.answering = threading.Event()
        """Cleared where no request is answered, until it is set again."""

        self.answering.set()

    def fail(self, fault: Fault | None, n: int = 1) -> None:
        """Forget what was planned; let the nth request from now on fail."""
        with self._lock:
            self._plan = None if fault is None else (fault, n)
            self.requests = 0

    def fail_all(self, really: bool) -> None:
        """Whether to answer every request with 500."""
        with self._lock:
            self._always = really

    @property
    def failed(self) -> bool:
        """Whether the planned fault has happened."""
        with self._lock:
            return self._plan is not None and self.requests >= self._plan[1]

    def next_fault(self) -> Fault | None:
        with self._lock:
            self.requests += 1
            if self._always:
                return "error"
            return self._plan[0] if self._plan is not None and self.requests == self._plan[1] else None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyS3

    def _serve(self) -> None:
        body = self._body(int(self.headers.get("Content-Length", 0)))
        fault = self.server.next_fault()
        self.server.answering.wait(60)
        if fault == "hang":
            time.sleep(self.server.patience)
            self.close_connection = True
            return
        if fault == "error":
            self._answer(500, {}, b"")
            return
        status, headers, content = self._forward(body)
        if fault == "error after":
            self._answer(500, {}, b"")
        else:
            self._answer(status, headers, content, half=fault == "half")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815  the library's names

    def _body(self, length: int) -> bytes:
        body = b""
        while rest := length - len(body):
            piece = self.rfile.read(min(rest, 64 << 10))
            if not piece:
                break
            body += piece
            if self.server.bytes_per_second:
                time.sleep(len(piece) / self.server.bytes_per_second)
        return body

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=30)
        try:
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], content: bytes, half: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = headers.get("content-length", "0") if self.command == "HEAD" else str(len(content))
        if half and not content:
            self.close_connection = True  # In the middle of the headers, then.
            self.flush_headers()
            return
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if half else content)
        self.close_connection = half

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def faulty(s3: S3) -> Iterator[FaultyS3]:
    with FaultyS3(s3) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
