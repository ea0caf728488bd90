"""Connections between programs and the host."""

from __future__ import annotations

from typing import Any

from era.drivers.guest import GUEST_LISTENERS

PRELUDE = (
    f"import socket\nHOST = ('127.0.0.1', {GUEST_LISTENERS['storage']})\n"
    + """
def read_all(sock):
    parts = []
    while part := sock.recv(1 << 16): parts.append(part)
    return b"".join(parts)
"""
)


def test_a_guest_listener_leads_to_the_host_while_that_listens(sandboxes: Any) -> None:
    sandbox = sandboxes.make()
    code = (
        PRELUDE + "with socket.create_connection(HOST, 5) as s: s.sendall(b'ehello'); s.shutdown(1); print(read_all(s))"
    )
    for _ in range(2):
        assert "ConnectionRefusedError" in sandboxes.run(sandbox, code).stderr
        for _ in range(2):
            result = sandboxes.run(sandbox, code, guest_listener=True)
            assert (result.stdout, result.connections) == ("b'hello'\n", ["e ended"]), result.stderr
    sandboxes.close(sandbox)


def test_connections_to_the_host_are_whole(sandboxes: Any, sandbox: Any) -> None:
    """Large, both ways at once, ended on one side before the other, and broken off."""
    code = (
        PRELUDE
        + """
import hashlib, os, threading
data = os.urandom(1 << 16) * 64
def send(sock):
    sock.sendall(b"e" + data)
    sock.shutdown(socket.SHUT_WR)
with socket.create_connection(HOST, 10) as sock:
    sender = threading.Thread(target=send, args=(sock,)); sender.start()
    heard = read_all(sock); sender.join()
    print(len(heard), hashlib.sha256(heard).digest() == hashlib.sha256(data).digest())
with socket.create_connection(HOST, 10) as sock:
    sock.sendall(b"w")
    print(len(read_all(sock)))
with socket.create_connection(HOST, 10) as sock:
    sock.sendall(b"r")
    try: print(sock.recv(1))
    except ConnectionResetError: print(b"")
    try:
        for _ in range(1000): sock.sendall(bytes(1 << 16))
        print("nobody minds")
    except OSError as error: print(type(error).__name__)
"""
    )
    result = sandboxes.run(sandbox, code, guest_listener=True)
    lines = result.stdout.splitlines()
    assert lines[:3] == [f"{1 << 22} True", f"{1 << 20}", "b''"], result.stderr
    assert lines[3] in ("BrokenPipeError", "ConnectionResetError")
    assert result.connections == ["e ended", "r ended", "w ended"]


def test_a_stalled_connection_holds_up_no_other(sandboxes: Any, sandbox: Any) -> None:
    code = (
        PRELUDE
        + """
import time
stuck = [socket.create_connection(HOST, 5) for _ in range(8)]
written = 0
for sock in stuck:
    sock.sendall(b"s")
    sock.setblocking(False)
still = time.monotonic() + 1
while time.monotonic() < still:
    for sock in stuck:
        try:
            written += sock.send(bytes(1 << 16))
            still = time.monotonic() + 1
        except BlockingIOError: pass
    assert written < 1 << 29, "there is no end to what it takes"
    time.sleep(0.01)
with socket.create_connection(HOST, 5) as sock:
    sock.sendall(b"ehello"); sock.shutdown(socket.SHUT_WR)
    print(read_all(sock))
"""
    )
    result = sandboxes.run(sandbox, code, guest_listener=True)
    assert result.stdout == "b'hello'\n", result.stderr
    assert result.connections == ["e ended", *["s ended"] * 8]


def test_the_end_of_a_run_is_the_end_of_its_connections(sandboxes: Any, sandbox: Any) -> None:
    code = (
        PRELUDE
        + """
import os, time
held = [socket.create_connection(HOST, 5) for _ in range(3)]
for sock, kind in zip(held, (b"e", b"s", b"e")):
    sock.sendall(kind + b"x" * 100)
assert held[0].recv(1) == held[2].recv(1) == b"x"
if os.fork() == 0:
    os.setsid()
    while True: time.sleep(10)
"""
    )
    for _ in range(2):
        result = sandboxes.run(sandbox, code, guest_listener=True)
        assert result.ended.exit_code == 0, result.stderr
        assert sorted(one[0] for one in result.connections) == ["e", "e", "s"]


def test_many_connections_at_a_time(sandboxes: Any, sandbox: Any) -> None:
    code = (
        PRELUDE
        + """
import threading
heard = []
def ask(n):
    with socket.create_connection(HOST, 20) as sock:
        sock.sendall(b"e%d" % n); sock.shutdown(socket.SHUT_WR)
        heard.append(int(read_all(sock)))
for wave in range(8):
    threads = [threading.Thread(target=ask, args=(wave * 16 + n,)) for n in range(16)]
    for one in threads: one.start()
    for one in threads: one.join()
print(sorted(heard) == list(range(128)))
"""
    )
    result = sandboxes.run(sandbox, code, guest_listener=True, timeout=60)
    assert result.stdout == "True\n", result.stderr
    assert result.connections == ["e ended"] * 128


def test_the_host_can_connect_to_a_port_inside(sandboxes: Any) -> None:
    sandbox = sandboxes.make()
    code = """
import os, socket
with socket.create_server(("127.0.0.1", 0)) as server:
    os.write(1, b"%d\\n" % server.getsockname()[1])
    sock, _ = server.accept()
    heard = b""
    while part := sock.recv(100): heard += part
    sock.sendall(heard.upper() * 100_000)
    sock.close()
"""
    for _ in range(2):
        result = sandboxes.run(sandbox, code, meanwhile="to")
        assert [(len(one), set(one.split("FROM "))) for one in result.connections] == [(1_200_000, {"", "OUTSIDE"})]
        result = sandboxes.run(sandbox, "import os, time; os.write(1, b'9\\n')", meanwhile="to")
        assert result.connections == ["refused"]
    sandboxes.close(sandbox)
