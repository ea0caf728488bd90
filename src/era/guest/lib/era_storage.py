"""Storage that sessions share: `kv` for text by key, `d1` for SQL, `r2` for bytes by key.

Every call goes to ERA_STORAGE_URL and is durable when it returns. What the service refuses is raised as StorageError.
A file of your own called era_storage.py is imported instead of this one.
"""

from __future__ import annotations

import _socket
import binascii
import json
import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["D1Storage", "KVStorage", "R2Storage", "StorageError", "d1", "kv", "r2"]

_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.~")
_NO_STORAGE = (
    'The session has "storage": false, or this is a command of its setup. '
    'PATCH it with "storage": true for its next run.'
)
_IDLE_SECONDS = 2.0  # the service closes a connection that is idle for longer than that
_MAX_IDLE = 4
_SILENT_SECONDS = 60
_idle: list[tuple[int, float, _socket.socket]] = []  # connections for later calls: (pid of their maker, since when, …)


class StorageError(Exception):
    """The service refused: `status` as in HTTP, 0 where it could not be reached; a `code`; and a `hint`."""

    def __init__(self, message: str, status: int = 0, code: str = "unreachable", hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip())
        self.status, self.code, self.hint = status, code, hint


class KVStorage:
    """Text by key."""

    def set(self, namespace: str, key: str, value: str, metadata: dict[str, Any] | None = None) -> bool:
        """Store a string, in the place of any other. True once it is durable."""
        return _call("PUT", _path("kv", namespace, key), {"value": value, "metadata": metadata})["success"] is True

    def get(self, namespace: str, key: str) -> str | None:
        """The string, None where there is none."""
        found = _get(_path("kv", namespace, key))
        return None if found is None else found["value"]

    def delete(self, namespace: str, key: str) -> bool:
        """True when there is nothing at this key any more."""
        return _call("DELETE", _path("kv", namespace, key))["success"] is True

    def list(self, namespace: str, prefix: str = "", limit: int | None = None) -> Any:
        """`[{"name", "metadata"}]` in the order of their names: all, or the first `limit`."""
        return _list("kv", namespace, prefix, limit)


class D1Storage:
    """An SQL database, SQLite's dialect, for each namespace."""

    def query(self, namespace: str, sql: str, params: Any = None) -> list[dict[str, Any]]:
        """Run one statement. Returns its rows as dicts."""
        answer = _call("POST", _path("d1", namespace, "query"), {"sql": sql, "params": params or []}, again=False)
        rows: list[dict[str, Any]] = answer["results"]
        return rows

    def exec(self, namespace: str, sql: str, params: Any = None) -> dict[str, Any]:
        """Run statements in one transaction. Returns `{"success", "results", "meta"}` of all of them."""
        return _call("POST", _path("d1", namespace, "exec"), {"sql": sql, "params": params or []}, again=False)


class R2Storage:
    """Bytes by key."""

    def put(self, namespace: str, key: str, content: bytes | str, metadata: dict[str, Any] | None = None) -> bool:
        """Store bytes (or a string, as UTF-8), in the place of any others. True once they are durable."""
        content = content.encode() if isinstance(content, str) else content
        encoded = binascii.b2a_base64(content, newline=False).decode()
        return _call("PUT", _path("r2", namespace, key), {"content": encoded, "metadata": metadata})["success"] is True

    def get(self, namespace: str, key: str) -> bytes | None:
        """The bytes, None where there are none."""
        found = _get(_path("r2", namespace, key))
        return None if found is None else binascii.a2b_base64(found["content"])

    def delete(self, namespace: str, key: str) -> bool:
        """True when there is nothing at this key any more."""
        return _call("DELETE", _path("r2", namespace, key))["success"] is True

    def list(self, namespace: str, prefix: str = "", limit: int | None = None) -> Any:
        """`[{"key", "size", "uploaded"}]` in the order of their keys: all, or the first `limit`."""
        return _list("r2", namespace, prefix, limit)


kv = KVStorage()
d1 = D1Storage()
r2 = R2Storage()


def _quoted(text: str) -> str:
    return "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in str(text).encode())


def _path(kind: str, namespace: str, rest: str) -> str:
    if not str(rest):  # with nothing behind the slash it would be the path of all keys
        raise StorageError("That can't be a key.", 400, "bad_key", "Use 1 to 1024 bytes of UTF-8 without NUL.")
    return f"/api/storage/{kind}/{_quoted(namespace)}/{_quoted(rest)}"


def _get(path: str) -> Any:
    """The JSON at this path, None where there is nothing. Raises StorageError."""
    try:
        return _call("GET", path)
    except StorageError as error:
        if error.status == 404:
            return None
        raise


def _list(kind: str, namespace: str, prefix: str, limit: int | None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor = ""
    while limit is None or len(found) < limit:
        size = 1000 if limit is None else min(1000, limit - len(found))
        page = _call("GET", f"/api/storage/{kind}/{_quoted(namespace)}?prefix={_quoted(prefix)}&limit={size}{cursor}")
        found += page["keys" if kind == "kv" else "objects"]
        if not page["cursor"]:
            break
        cursor = f"&cursor={_quoted(page['cursor'])}"
    return found


def _call(method: str, path: str, body: Any = None, again: bool = True) -> dict[str, Any]:
    """Make a call, and return the JSON of its answer. `again`: whether it may be made twice, should the service have
    closed the connection meanwhile. Raises StorageError."""
    host, port = _address()
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}:{port}\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    request = head.encode() + b"\r\n" + content
    while True:
        sock, used = _connection(host, port)
        try:
            sock.sendall(request)
            status, answer, reusable = _answer(sock)
        except OSError as error:
            sock.close()
            if used and again and not isinstance(error, TimeoutError):  # then it may still do what was asked
                again = False
                continue
            raise StorageError(f"The storage can't be reached: {error}.") from None
        except BaseException:
            sock.close()
            raise
        break
    if reusable and len(_idle) < _MAX_IDLE:
        _idle.append((os.getpid(), time.monotonic(), sock))
    else:
        sock.close()
    told: dict[str, Any] = json.loads(answer)
    if status >= 400:
        raise StorageError(told["error"], status, told["code"], told["hint"])
    return told


def _address() -> tuple[str, int]:
    """Host and port of the storage. Raises StorageError where there is none."""
    url = os.environ.get("ERA_STORAGE_URL", "")
    host, _, port = url.partition("://")[2].partition("/")[0].rpartition(":")
    if not port.isdigit():
        if not url:
            raise StorageError("There is no storage here.", code="no_storage", hint=_NO_STORAGE)
        raise StorageError("ERA_STORAGE_URL doesn't say where the storage is.", code="no_storage")
    return host, int(port)


def _connection(host: str, port: int) -> tuple[_socket.socket, bool]:
    """A connection, and whether it has been used before. Raises StorageError."""
    while _idle:
        try:
            pid, since, sock = _idle.pop()
        except IndexError:
            break  # another thread has taken it
        if pid == os.getpid() and time.monotonic() - since < _IDLE_SECONDS:
            return sock, True
        sock.close()  # too old, or our parent's
    sock = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
    try:
        sock.settimeout(_SILENT_SECONDS)
        sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
        sock.connect((host, port))
    except OSError as error:
        sock.close()
        raise StorageError(f"The storage can't be reached: {error}.") from None
    return sock, False


def _answer(sock: _socket.socket) -> tuple[int, bytes, bool]:
    """The status and body of an answer, and whether the connection can be used again. Raises OSError."""
    received = b""
    while (end := received.find(b"\r\n\r\n")) < 0:
        received += _receive(sock)
    lines = received[:end].decode("latin-1").split("\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    parts, missing = [received[end + 4 :]], int(fields["content-length"]) - len(received) + end + 4
    while missing > 0:
        parts.append(_receive(sock))
        missing -= len(parts[-1])
    return int(lines[0].split(" ")[1]), b"".join(parts), fields.get("connection", "").lower() != "close"


def _receive(sock: _socket.socket) -> bytes:
    data = sock.recv(1 << 18)
    if not data:
        raise ConnectionError("the connection was closed")
    return data
