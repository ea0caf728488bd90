"""A registry of Python and Node packages and Go modules on loopback, and packages for it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Registry:
    """A registry's content."""

    url: str = ""
    pages: dict[str, bytes] = field(default_factory=dict)
    """What is served, by path."""

    asked: list[str] = field(default_factory=list)
    """The paths that were asked for."""

    def environment(self) -> dict[str, str]:
        """Variables that make it the only registry of uv and npm."""
        return {
            "UV_DEFAULT_INDEX": f"{self.url}/simple",
            "UV_HTTP_RETRIES": "0",
            "npm_config_registry": f"{self.url}/npm/",
            "npm_config_fetch_retries": "0",
            "GOPROXY": f"{self.url}/go",
            "GOSUMDB": "off",
            "NO_PROXY": "127.0.0.1",
        }

    def put_python(self, name: str, file: str, content: bytes) -> None:
        self.pages[f"/files/{file}"] = content
        page = f'<!DOCTYPE html><a href="/files/{file}">{file}</a>'
        self.pages[f"/simple/{name}/"] = self.pages.get(f"/simple/{name}/", b"") + page.encode()

    def put_npm(self, name: str, tarball: bytes, package: Mapping[str, Any], version: str = "1.0.0") -> None:
        path = f"/npm/{name}/-/{name}-{version}.tgz"
        self.pages[path] = tarball
        integrity = "sha512-" + base64.b64encode(hashlib.sha512(tarball).digest()).decode()
        dist = {"tarball": f"{self.url}{path}", "integrity": integrity}
        entry = {"name": name, "version": version, **package, "dist": dist}
        if "scripts" in package:
            entry["hasInstallScript"] = True
        before = json.loads(self.pages.get(f"/npm/{name}", b'{"versions": {}}'))["versions"]
        known = {"name": name, "dist-tags": {"latest": version}, "versions": {**before, version: entry}}
        self.pages[f"/npm/{name}"] = json.dumps(known).encode()

    def put_go(
        self, path: str, files: Mapping[str, str], requires: Sequence[str] = (), version: str = "v1.0.0"
    ) -> None:
        """Serve a module with these files, by name."""
        needs = "".join(f"require {name} v1.0.0\n" for name in requires)
        every = {"go.mod": f"module {path}\n\ngo 1.20\n\n{needs}", **files}
        written = io.BytesIO()
        with zipfile.ZipFile(written, "w") as archive:
            for name, content in every.items():
                archive.writestr(f"{path}@{version}/{name}", content)
        info = json.dumps({"Version": version, "Time": "2024-01-01T00:00:00Z"}).encode()
        self.pages |= {
            f"/go/{path}/@latest": info,
            f"/go/{path}/@v/list": f"{version}\n".encode(),
            f"/go/{path}/@v/{version}.info": info,
            f"/go/{path}/@v/{version}.mod": every["go.mod"].encode(),
            f"/go/{path}/@v/{version}.zip": written.getvalue(),
        }


@contextmanager
def serving(port: int = 0) -> Iterator[Registry]:
    """A registry that is served within the block."""
    registry = Registry()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            registry.asked += [self.path] if self.command == "GET" else []
            content = registry.pages.get(self.path)
            self.send_response(200 if content is not None else 404)
            kind = "text/html" if self.path.startswith("/simple/") else "application/octet-stream"
            self.send_header("Content-Type", "application/json" if self.path.startswith("/npm/") else kind)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content or b"")

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    registry.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield registry
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def wheel(
    name: str, files: Mapping[str, str], odd: Mapping[str, tuple[int, str]] | None = None, version: str = "1.0"
) -> bytes:
    """A wheel. `odd` are entries with a mode of their own (a link's content is its target)."""
    info = f"{name}-{version}.dist-info"
    every = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*every, *(odd or {}), f"{info}/RECORD"])
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for path, text in {**every, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)
        for path, (mode, text) in (odd or {}).items():
            entry = zipfile.ZipInfo(path)
            entry.create_system, entry.external_attr = 3, mode << 16
            archive.writestr(entry, text)
    return written.getvalue()


def tarball(entries: Mapping[str, str | tuple[bytes, str]], top: str = "package") -> bytes:
    """A tar.gz of entries below `top`: a file's text, or a tuple of tarfile's entry type and link target."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as archive:
        for path, content in entries.items():
            entry = tarfile.TarInfo(path if path.startswith("/") else f"{top}/{path}")
            entry.mode = 0o6777
            if isinstance(content, tuple):
                entry.type, entry.linkname = content
                archive.addfile(entry)
            else:
                entry.size = len(content.encode())
                archive.addfile(entry, io.BytesIO(content.encode()))
    return written.getvalue()


def put_evil_npm(registry: Registry, package: dict[str, Any], more: Mapping[str, Any] | None = None) -> None:
    """Serve a package `evil` of npm; `package` are fields of its package.json, `more` are further entries."""
    text = json.dumps({"name": "evil", "version": "1.0.0", **package})
    registry.put_npm("evil", tarball({"package.json": text, "index.js": "module.exports = 1", **(more or {})}), package)
