"""Programs that serve inside a session, and the call that starts them in the background."""

from __future__ import annotations

from typing import Any

import httpx

from tests.conftest import eventually

HTTP_SERVER = """\
import json, os, socket, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def reply(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        name = self.path.partition("?")[0].strip("/")
        getattr(self, f"on_{name}", self.on_echo)()

    def body(self):  # all of it: what is left unread would be taken for the next request
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        read = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            read += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return read

    def on_echo(self):
        body = self.body()
        request = {"method": self.command, "path": self.path, "headers": self.headers.items()}
        request["body"] = body.decode("latin-1")
        self.reply(json.dumps(request).encode())

    def on_status(self):
        status = int(self.path.partition("?")[2])
        self.reply(b"" if status in (204, 304) else b"body", status, ETag='"1"')

    def on_big(self):  # as many MiB as asked for
        self.send_response(200)
        self.send_header("Content-Length", str(int(self.path.partition("?")[2]) << 20))
        self.end_headers()
        for _ in range(int(self.path.partition("?")[2])):
            self.wfile.write(bytes(1 << 20))

    def on_sink(self):
        left = total = int(self.headers["Content-Length"])
        while left:
            left -= len(self.rfile.read(min(left, 1 << 20)))
        self.reply(str(total).encode())

    def chunk(self, data):
        self.wfile.write(b"%x\\r\\n%b\\r\\n" % (len(data), data))

    def on_events(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for n in range(3):
            self.chunk(f"data: {n}\\n\\n".encode())
            while not os.path.exists(f"/tmp/go{n}"):
                time.sleep(0.01)
        self.chunk(b"")

    def on_go(self):
        open("/tmp/go" + self.path.partition("?")[2], "w").close()
        self.reply(b"")

    def on_chunks(self):  # what comes in chunks goes out in chunks, each as soon as it is there
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while size := int(self.rfile.readline(), 16):
            self.chunk(self.rfile.read(size).upper())
            self.rfile.readline()
        self.rfile.readline()
        self.chunk(b"")

    def on_raw(self):  # bytes as asked for, then the end of the connection
        self.wfile.write(bytes.fromhex(self.path.partition("?")[2]))
        self.close_connection = True

    def on_hold(self):
        print("holding", flush=True)
        time.sleep(600)

    def on_write(self):
        with open("written.txt", "a") as file:
            file.write("x")
        self.reply(b"")

    do_POST = do_PUT = do_DELETE = do_HEAD = do_OPTIONS = do_PATCH = do_PURGE = do_GET

    def log_message(self, *_):
        pass

class Threading(ThreadingHTTPServer):
    address_family = socket.AF_INET6 if os.environ.get("V6") else socket.AF_INET
    request_queue_size = 128

host, port = "::1" if os.environ.get("V6") else "127.0.0.1", int(os.environ.get("PORT", "3000"))
server = Threading((host, port), Handler)
print("listening", flush=True)
server.serve_forever()
"""

WEBSOCKET_ECHO = """\
const crypto = require("crypto"), http = require("http");
const server = http.createServer((request, response) => response.end(request.headers.upgrade ?? "no upgrade"));
server.on("upgrade", (request, socket, head) => {
  if (request.url === "/refused") return socket.end("HTTP/1.1 403 Forbidden\\r\\nContent-Length: 2\\r\\n\\r\\nno");
  const accept = crypto.createHash("sha1")
    .update(request.headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest("base64");
  const protocol = request.headers["sec-websocket-protocol"];
  socket.write("HTTP/1.1 101 Switching Protocols\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade\\r\\n"
    + `Sec-WebSocket-Accept: ${accept}\\r\\nSet-Cookie: c=1\\r\\nStrict-Transport-Security: max-age=1\\r\\n`
    + (protocol ? `Sec-WebSocket-Protocol: ${protocol.split(",")[0]}\\r\\n` : "") + "\\r\\n");
  if (request.url === "/greet") socket.write(Buffer.from([0x81, 2, 104, 105]));
  let seen = Buffer.from(head), pieces = [], size = 0, needed = 0;
  const answer = (data) => {  // a frame is sent back as it came, but for its mask
    pieces.push(data);
    size += data.length;
    if (seen.length + size < needed) return;
    seen = Buffer.concat([seen, ...pieces]);
    pieces = [];
    size = needed = 0;
    for (;;) {
      if (seen.length < 6) return;
      let length = seen[1] & 127, at = 2;
      if (length === 126) { length = seen.readUInt16BE(2); at = 4; }
      if (length === 127) { length = Number(seen.readBigUInt64BE(2)); at = 10; }
      needed = at + 4 + length;
      if (seen.length < needed) return;
      const mask = seen.subarray(at, at + 4), body = Buffer.from(seen.subarray(at + 4, at + 4 + length));
      for (let i = 0; i < length; i++) body[i] ^= mask[i & 3];
      const start = Buffer.from(seen.subarray(0, at));
      start[1] &= 127;
      socket.write(Buffer.concat([start, body]));
      const closing = (seen[0] & 15) === 8;
      seen = seen.subarray(needed);
      needed = 0;
      if (closing) return socket.end();
    }
  };
  socket.on("data", answer);
  socket.on("error", () => {});
});
server.listen(process.env.PORT ?? 3000, () => console.log("listening"));
"""


def start_in_background(client: httpx.Client, session: str, code: str, **fields: Any) -> str:
    """Start a run in the background; returns its id."""
    answer = client.post(f"/api/sessions/{session}/run", json={"code": code, "background": True, **fields})
    assert answer.status_code == 202, answer.text
    assert answer.json() == {"run_id": answer.json()["run_id"], "status": "running"}
    return str(answer.json()["run_id"])


def serve_in_background(client: httpx.Client, session: str, code: str, **fields: Any) -> str:
    """Start one of these servers in the background and wait until it listens; returns the id of its run.

    A call may come sooner, and waits for 5 seconds: that is less than a program takes to start on a busy machine.
    """
    run_id = start_in_background(client, session, code, **fields)
    said = f"/api/sessions/{session}/runs/{run_id}/stdout"
    assert eventually(lambda: "listening" in client.get(said).text, 120)
    return run_id
