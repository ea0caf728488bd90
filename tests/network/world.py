"""The rest of the world, as one process in a network namespace of its own: web servers, DNS, and private networks.

Run as a program, with the directory of its keys: serves until its stdin ends.

    http  80, https 443    GET /hello, /big?mb=N, /drip?seconds=N, /redirect?to=URL, /hang, /open, /queries,
                           /redirect-token and /no-such-page (which repeat X-Token; TRACE repeats all headers),
                           /messages (all that the nameserver was sent, in hex), /users/NAME
                           POST /upload, /posts (JSON, which comes back with an id), /hooks/NAME (GET has what came;
                           a NAME that begins with `late` answers 503 to the first)
                           /socket, a WebSocket that says back the short messages it hears
                           /git/NAME.git, the repository NAME.git in `git` below the directory, by git's own server
    https 8443             the same with a certificate that nobody has signed
    tcp   9000             says what it was sent
    udp   9000             the same
    tcp   6379             a database with SET and GET, in Redis's protocol
    dns   53               over UDP and TCP: names of NAMES, each with the TXT "text"
                           `rebind.test` is public once and loopback ever after, per name below it
                           names below `silent.test` are never answered over UDP
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

PUBLIC, OTHER, DNS = "203.0.113.10", "198.51.100.7", "203.0.113.53"
PUBLIC_V6 = "2001:db8:77::10"
PRIVATE = ["10.77.0.2", "172.16.77.2", "192.168.77.2", "100.64.77.2", "169.254.169.254", "198.18.77.2"]
PRIVATE_V6 = ["fd77::2", "fec0:77::2"]
OWN, OWN_PRIVATE, OWN_V6 = "203.0.113.1", "10.77.0.1", "2001:db8:77::1"

NAMES = {
    "www.example.test": [PUBLIC],
    "api.example.test": [PUBLIC],
    "example.test": [PUBLIC],
    "other.test": [OTHER],
    "v6.test": [PUBLIC_V6],
    "inside.test": ["10.77.0.2"],
    "loop.test": ["127.0.0.1"],
    "own.test": [OWN],
    "meta.test": ["169.254.169.254"],
    "mixed.test": ["10.77.0.2", PUBLIC],
    "dead.test": ["203.0.113.99"],
    "both.test": ["2001:db8:77::99", PUBLIC],
}
CHUNK = bytes(range(256)) * 256

open_requests = 0
queries: list[str] = []
messages: list[str] = []
hooks: dict[str, list[dict[str, Any]]] = {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        global open_requests
        url = urlsplit(self.path)
        asked = {name: values[0] for name, values in parse_qs(url.query).items()}
        open_requests += 1
        try:
            if url.path == "/hello":
                told = {"hello": self.headers["Host"], "path": self.path, "headers": dict(self.headers)}
                self.answer({**told, "length": len(self.headers["X-Token"] or "")})
            elif url.path == "/big":
                size = int(asked["mb"]) << 20
                self.send_response(200)
                self.send_header("Content-Length", str(size))
                self.end_headers()
                for _ in range(size // len(CHUNK)):
                    self.wfile.write(CHUNK)
            elif url.path == "/drip":
                self.send_response(200)
                self.send_header("Connection", "close")
                self.end_headers()
                for n in range(int(float(asked["seconds"]) * 20)):
                    self.wfile.write(f"{n}\n".encode())
                    time.sleep(0.05)
            elif url.path == "/redirect":
                self.answer({}, 302, Location=asked["to"])
            elif url.path == "/hang":
                self.rfile.read(1)  # until the other side is gone
            elif url.path == "/open":
                self.answer(open_requests - 1)
            elif url.path == "/redirect-token":
                self.answer({}, 302, Location=f"http://{self.headers['Host']}/?key={self.headers['X-Token']}")
            elif url.path == "/no-such-page":
                self.answer({"error": f"no page for {self.headers['X-Token']}"}, 404)
            elif url.path == "/queries":
                self.answer(queries)
            elif url.path == "/messages":
                self.answer(messages)
            elif url.path == "/socket":
                self.speak_websocket()
            elif url.path.startswith("/hooks/"):
                self.answer(hooks.get(url.path, []))
            elif url.path.startswith("/git/"):
                self.answer_git(b"")
            elif url.path.startswith("/users/"):
                login = url.path.removeprefix("/users/")
                self.answer({"login": login, "name": login.title(), "public_repos": 7})
            else:
                self.answer({"no": self.path}, 404)
        except OSError:
            self.close_connection = True
        finally:
            open_requests -= 1

    def speak_websocket(self) -> None:
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        for name, text in {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Accept": accept}.items():
            self.send_header(name, text)
        self.end_headers()
        self.close_connection = True
        while head := self.rfile.read(2):
            size = head[1] & 127
            mask = self.rfile.read(4)
            said = bytes(one ^ mask[n % 4] for n, one in enumerate(self.rfile.read(size)))
            self.wfile.write(bytes([head[0], size]) + said)
            if head[0] & 15 == 8:  # the client's goodbye
                return

    def answer_git(self, body: bytes) -> None:
        """Answer as git-http-backend(1) does. Whoever asks may push."""
        url = urlsplit(self.path)
        variables = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": str(Path(sys.argv[1]) / "git"),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_PROTOCOL": self.headers["Git-Protocol"] or "",
            "REMOTE_USER": "somebody",
            "REQUEST_METHOD": self.command,
            "PATH_INFO": url.path.removeprefix("/git"),
            "QUERY_STRING": url.query,
            "CONTENT_TYPE": self.headers["Content-Type"] or "",
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers["Content-Encoding"] or "",
        }
        said = subprocess.run(["git", "http-backend"], input=body, env=variables, capture_output=True, check=True)
        head, _, content = said.stdout.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().splitlines())
        self.send_response(int(fields.pop("Status", "200").split()[0]))
        for name, text in {**fields, "Content-Length": str(len(content))}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(content)

    def do_TRACE(self) -> None:
        self.answer(str(self.headers))

    def do_POST(self) -> None:
        if self.path == "/posts":
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told = {"length": len(sent["token"])} if "token" in sent else {}
            self.answer({**sent, **told, "id": 101}, 201)
            return
        if self.path.startswith("/git/"):
            self.answer_git(self.rfile.read(int(self.headers["Content-Length"])))
            return
        if self.path.startswith("/hooks/"):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            came = hooks.setdefault(self.path, [])
            came.append({"headers": dict(self.headers), "body": body})
            self.answer({}, 503 if len(came) == 1 and self.path.startswith("/hooks/late") else 200)
            return
        size, digest = 0, hashlib.sha256()
        if self.headers.get("Transfer-Encoding") == "chunked":
            while length := int(self.rfile.readline(), 16):
                piece = self.rfile.read(length)
                self.rfile.readline()
                size += len(piece)
                digest.update(piece)
            self.rfile.readline()
        else:
            left = int(self.headers["Content-Length"])
            while left and (piece := self.rfile.read(min(left, 1 << 16))):
                left -= len(piece)
                size += len(piece)
                digest.update(piece)
        self.answer({"size": size, "sha256": digest.hexdigest()})


class Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = True
    request_queue_size = 128

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, *_: Any) -> None:
        pass


def addresses(name: str) -> list[str]:
    """What a name means at this moment."""
    if name.endswith("rebind.test"):
        return [PUBLIC if queries.count(f"A {name}") == 1 else "127.0.0.1"]
    return NAMES.get(name, [])


def resolved(query: bytes) -> bytes:
    """A and AAAA of NAMES, each answer good for no time at all; of anything else its TXT is "text"."""
    messages.append(query.hex())
    labels, at = [], 12
    while query[at]:
        labels.append(query[at + 1 : at + 1 + query[at]].decode().lower())
        at += 1 + query[at]
    kind = struct.unpack("!H", query[at + 1 : at + 3])[0]
    name = ".".join(labels)
    queries.append(f"{ {1: 'A', 28: 'AAAA'}.get(kind, '?') } {name}")
    family = {1: socket.AF_INET, 28: socket.AF_INET6}.get(kind)
    found = [one for one in addresses(name) if family and (":" in one) == (family == socket.AF_INET6)]
    packed = [socket.inet_pton(socket.AF_INET6 if ":" in one else socket.AF_INET, one) for one in found]
    known = name in NAMES or name.endswith("rebind.test")
    if kind == 16 and known:
        packed = [b"\x04text"]
    head = query[:2] + struct.pack("!HHHHH", 0x8180 if known else 0x8183, 1, len(packed), 0, 0)
    return (
        head
        + query[12 : at + 5]
        + b"".join(b"\xc0\x0c" + struct.pack("!HHIH", kind, 1, 0, len(one)) + one for one in packed)
    )


def serve_dns() -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((DNS, 53))
    while True:
        query, who = sock.recvfrom(4096)
        answer = resolved(query)
        if not queries[-1].endswith(".silent.test"):
            sock.sendto(answer, who)


def serve_dns_tcp() -> None:
    listener = socket.create_server((DNS, 53))
    while True:
        client, _ = listener.accept()
        with client, client.makefile("rb") as asked:
            while size := asked.read(2):
                answer = resolved(asked.read(int.from_bytes(size)))
                client.sendall(len(answer).to_bytes(2) + answer)


def serve_udp_echo() -> None:
    for address in (PUBLIC, OTHER, PUBLIC_V6):
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((address, 9000))
        threading.Thread(target=echo_datagrams, args=(sock,), daemon=True).start()


def echo_datagrams(sock: socket.socket) -> None:
    while True:
        data, who = sock.recvfrom(1 << 16)
        sock.sendto(data, who)


def serve_database() -> None:
    listener = socket.create_server(("::", 6379), family=socket.AF_INET6, dualstack_ipv6=True)
    kept: dict[bytes, bytes] = {}
    while True:
        client, _ = listener.accept()
        threading.Thread(target=query_database, args=(client, kept), daemon=True).start()


def query_database(client: socket.socket, kept: dict[bytes, bytes]) -> None:
    with client, client.makefile("rb") as asked:
        while line := asked.readline():
            words = []
            for _ in range(int(line[1:])):
                words.append(asked.read(int(asked.readline()[1:])))
                asked.readline()
            if words[0].upper() == b"SET":
                kept[words[1]] = words[2]
                client.sendall(b"+OK\r\n")
            elif words[1] in kept:
                client.sendall(b"$%d\r\n%s\r\n" % (len(kept[words[1]]), kept[words[1]]))
            else:
                client.sendall(b"$-1\r\n")


def serve_echo() -> None:
    listener = socket.create_server(("::", 9000), family=socket.AF_INET6, dualstack_ipv6=True)
    while True:
        client, _ = listener.accept()
        threading.Thread(target=echo, args=(client,), daemon=True).start()


def echo(client: socket.socket) -> None:
    with client:
        while data := client.recv(1 << 16):
            client.sendall(data)


def main() -> None:
    keys = Path(sys.argv[1])
    plain, secure = Server(("::", 80), Handler), Server(("::", 443), Handler)
    unsigned = Server(("::", 8443), Handler)
    for server, name in ((secure, "server"), (unsigned, "unsigned")):
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(keys / f"{name}.pem", keys / f"{name}.key")
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    serve_udp_echo()
    web = (server.serve_forever for server in (plain, secure, unsigned))
    for serve in (*web, serve_dns, serve_dns_tcp, serve_echo, serve_database):
        threading.Thread(target=serve, daemon=True).start()
    print("up", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
