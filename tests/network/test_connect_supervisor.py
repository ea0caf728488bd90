"""Programs that open their own connections, as if the sandbox had a network."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import eventually
from tests.gvisor import BOTH_KINDS
from tests.network import world
from tests.network.conftest import Machine, NetServer, NewSession, new_session
from tests.soaking import soak_the_rest

PYTHON_TCP = """
import socket
sock = socket.create_connection(("www.example.test", 9000), 5)
print(sock.getpeername()[:2])
sock.sendall(b"hello")
sock.shutdown(socket.SHUT_WR)
print(b"".join(iter(lambda: sock.recv(100), b"")))
"""
ASYNCIO_TCP = """
import asyncio
async def main():
    reader, writer = await asyncio.open_connection("www.example.test", 9000)
    print(writer.get_extra_info("peername")[:2])
    writer.write(b"hello")
    writer.write_eof()
    print(await reader.read())
asyncio.run(main())
"""
NODE_TCP = """
const net = require('node:net');
const sock = net.connect(9000, 'www.example.test', () => {
  console.log(`('${sock.remoteAddress}', ${sock.remotePort})`);
  sock.end('hello');
});
sock.on('data', (data) => console.log(`b'${data}'`));
"""
TCP = {"socket": ("python", PYTHON_TCP), "asyncio": ("python", ASYNCIO_TCP), "node:net": ("node", NODE_TCP)}


outside = pytest.mark.parametrize("kind", BOTH_KINDS)
"""For tests of what the service does with a connection or a question once it has it."""


@pytest.fixture(scope="module")
def as_a_user(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetServer]:
    """A server of an ordinary user's."""
    server = machine.serve(tmp_path_factory.mktemp("user") / "data", uid=54322, SSL_CERT_FILE="")
    yield server
    server.stop()


@pytest.mark.parametrize("client", TCP)
def test_a_connection_is_what_it_would_be_elsewhere(anywhere: NewSession, client: str) -> None:
    language, code = TCP[client]
    one = anywhere(language)
    for _ in range(2):
        assert one.says(code) == f"('{world.PUBLIC}', 9000)\nb'hello'\n"
    record = one.record()
    assert record["enforced"]["network"] == "full"
    assert record["egress"]["destinations"] == [
        {
            "host": "www.example.test",
            "port": 9000,
            "address": world.PUBLIC,
            "allowed": True,
            "reason": None,
            "connections": 1,
            "sent": 5,
            "received": 5,
            "secrets": [],
        }
    ]


@pytest.mark.parametrize("client", soak_the_rest(TCP, ("socket",)))
def test_the_same_where_an_ordinary_user_serves(as_a_user: NetServer, client: str, kind: str) -> None:
    language, code = TCP[client]
    with as_a_user.client() as http:
        one = new_session(http, language, isolation=kind)
        assert one.says(code) == f"('{world.PUBLIC}', 9000)\nb'hello'\n"
        assert one.record()["enforced"]["network"] == "full"
        assert one.says(UDP["unconnected"][1] if language == "python" else UDP["node:dgram"][1]) == "answer\n"


def test_https_without_any_proxy(anywhere: NewSession, machine: Machine) -> None:
    for language, code in {
        "python": "import os, urllib.request\n"
        "print([name for name in os.environ if name.lower().endswith('_proxy') and name != 'ERA_PROXY_URL'])\n"
        "print(urllib.request.urlopen('https://www.example.test/hello', timeout=10).status)",
        "node": "console.log('[]'); fetch('https://www.example.test/hello').then((a) => console.log(a.status))",
    }.items():
        one = anywhere(language)
        one.client.put(f"/api/sessions/{one.id}/files/ca.pem", content=(machine.keys / "ca.pem").read_bytes())
        trust = {"SSL_CERT_FILE": "/workspace/ca.pem", "NODE_EXTRA_CA_CERTS": "/workspace/ca.pem"}
        assert one.says(code, env=trust) == "[]\n200\n"


@outside
def test_a_database(anywhere: NewSession) -> None:
    """Many commands sent ahead of their answers, on one connection of several."""
    code = """
import asyncio
def command(*words):
    return b"*%d\\r\\n" % len(words) + b"".join(b"$%d\\r\\n%s\\r\\n" % (len(word), word) for word in words)
async def one(name):
    reader, writer = await asyncio.open_connection("www.example.test", 6379)
    for n in range(500):
        writer.write(command(b"SET", b"%s-%d" % (name, n), b"value %d" % n) + command(b"GET", b"%s-%d" % (name, n)))
    await writer.drain()
    for n in range(500):
        assert await reader.readline() == b"+OK\\r\\n"
        size = int((await reader.readline())[1:])
        assert (await reader.readexactly(size + 2)) == b"value %d\\r\\n" % n
    writer.close()
    return name
async def main():
    print(await asyncio.gather(*(one(b"%d" % n) for n in range(8))))
asyncio.run(main())
"""
    assert anywhere().says(code).startswith("[b'0'")


# -- names ------------------------------------------------------------------------------------------------------

ASK = r"""
import socket, struct
def question(name, kind):
    labels = b"".join(bytes([len(one)]) + one.encode() for one in name.split("."))
    return b"\x12\x34" + struct.pack("!HHHHH", 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", kind, 1)
server = open("/etc/resolv.conf").read().split()[1]
"""


def test_names_are_resolved(anywhere: NewSession) -> None:
    code = """
import socket
print(sorted({one[4][0] for one in socket.getaddrinfo("both.test", 80)}))
print(socket.gethostbyname("api.example.test"))
for name in ("no.such.test", "localhost"):
    try: print(socket.gethostbyname(name))
    except socket.gaierror as error: print(error.strerror)
"""
    assert anywhere().says(code).splitlines() == [
        str(sorted(["2001:db8:77::99", world.PUBLIC])),
        world.PUBLIC,
        "Name or service not known",
        "127.0.0.1",
    ]


@outside
def test_node_resolves_names_both_ways(anywhere: NewSession) -> None:
    code = """
import dns from 'node:dns/promises';
console.log((await dns.lookup('www.example.test')).address, await dns.resolve4('www.example.test'),
  await dns.resolve6('v6.test'), await dns.resolveTxt('example.test'));
console.log(await dns.resolve4('no.such.test').catch((error) => error.code));
"""
    assert anywhere("node").says(code).splitlines() == [
        f"{world.PUBLIC} [ '{world.PUBLIC}' ] [ '{world.PUBLIC_V6}' ] [ [ 'text' ] ]",
        "ENOTFOUND",
    ]


@outside
def test_any_question_may_be_asked_in_any_way(anywhere: NewSession) -> None:
    code = (
        ASK
        + """
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(5)
sock.sendto(question("example.test", 16), (server, 53))
answer, who = sock.recvfrom(1000)
print(answer[-5:], who == (server, 53))
sock = socket.create_connection((server, 53), 5)
for name in ("example.test", "other.test"):
    message = question(name, 1)
    sock.sendall(struct.pack("!H", len(message)) + message)
    size = struct.unpack("!H", sock.recv(2))[0]
    print(socket.inet_ntoa(sock.recv(size)[-4:]))
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(5)
sock.sendto(question("example.test", 1), ("203.0.113.53", 53))  # another server than the sandbox's
answer, who = sock.recvfrom(1000)
print(socket.inet_ntoa(answer[-4:]), who)
"""
    )
    assert anywhere().says(code).splitlines() == [
        "b'\\x04text' True",
        world.PUBLIC,
        world.OTHER,
        f"{world.PUBLIC} ('203.0.113.53', 53)",
    ]


def test_nonsense_for_a_question_is_answered_with_an_error(session: NewSession) -> None:
    code = (
        ASK
        + r"""
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(5)
good = question("example.test", 1)
for message in (b"", b"\x12", good[:12], good[:20], good[:4] + b"\0\2" + good[6:], good[:12] + b"\xc0\x0c\0\1\0\1",
                good[:12] + b"\x3f" + b"a" * 10, good[:12] + b"\1\0\0\0\1\0\1", bytes(4000)):
    sock.sendto(message, (server, 53))
    print(sock.recv(1000)[3] & 15, end=" ")
sock.sendto(good, (server, 53))
print(socket.inet_ntoa(sock.recv(1000)[-4:]))
"""
    )
    assert session().says(code) == "1 " * 9 + world.PUBLIC + "\n"


# -- datagrams --------------------------------------------------------------------------------------------------

UDP = {
    "connected": (
        "python",
        """
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(5)
sock.connect(("203.0.113.10", 9000))
sock.send(b"answer"); print(sock.recv(100).decode())
""",
    ),
    "unconnected": (
        "python",
        """
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(5)
said = []
for host in ("203.0.113.10", "198.51.100.7", "203.0.113.10"):
    sock.sendto(host.encode(), (host, 9000))
    said.append(sock.recvfrom(100))
assert said == [(host.encode(), (host, 9000)) for host in ("203.0.113.10", "198.51.100.7", "203.0.113.10")], said
print("answer")
""",
    ),
    "sendmsg": (
        "python",
        """
import socket
sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
sock.settimeout(5)
sock.sendmsg([b"ans", b"wer"], [], 0, ("2001:db8:77::10", 9000)); print(sock.recvfrom(100)[0].decode())
sock.sendto(b"mapped", ("::ffff:203.0.113.10", 9000))
assert sock.recvfrom(100)[:2] == (b"mapped", ("::ffff:203.0.113.10", 9000, 0, 0))
""",
    ),
    "node:dgram": (
        "node",
        """
const sock = require('node:dgram').createSocket('udp4');
sock.on('message', (data, from) => { console.log(from.port === 9000 ? `${data}` : from); sock.close(); });
sock.send('answer', 9000, 'www.example.test');
""",
    ),
}


@pytest.mark.parametrize("how", UDP)
def test_datagrams(anywhere: NewSession, how: str) -> None:
    language, code = UDP[how]
    one = anywhere(language)
    assert one.says(code) == "answer\n"
    assert [each["allowed"] for each in one.destinations()] in ([True], [True, True])


@outside
def test_a_datagram_of_the_greatest_size(anywhere: NewSession) -> None:
    code = """
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(5)
for size in (0, 1, 1400, 9000, 65507):
    sock.sendto(bytes(size), ("203.0.113.10", 9000))
    print(len(sock.recv(70000)), end=" ")
"""
    assert anywhere().says(code) == "0 1 1400 9000 65507 "


# -- connecting -------------------------------------------------------------------------------------------------


def test_failures_are_those_of_a_network(anywhere: NewSession, kind: str) -> None:
    code = """
import errno, select, socket
def name(number): return errno.errorcode.get(number, number)
def blocking(*place):
    try: socket.create_connection(place); return "connected"
    except OSError as error: return name(error.errno)
print(blocking("203.0.113.10", 81), blocking("2001:db8:77::10", 81), blocking("203.0.113.99", 80))
sock = socket.socket()
sock.setblocking(False)
print(name(sock.connect_ex(("203.0.113.10", 81))))
sock = socket.socket()
sock.setblocking(False)
poll = select.epoll()
poll.register(sock, select.EPOLLOUT | select.EPOLLIN | select.EPOLLET)
print(name(sock.connect_ex(("203.0.113.10", 9000))) in (0, "EINPROGRESS"))
print(poll.poll(5) == [(sock.fileno(), select.EPOLLOUT)], sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
sock.send(b"x")
while not any(event & select.EPOLLIN for _, event in poll.poll(5)): pass  # it can be written to before
print(select.EPOLLIN, sock.recv(10), sock.getblocking())
"""
    one = anywhere()
    said = one.says(code, timeout=60).splitlines()
    # gVisor's sockets never wait, and by the time it's known that nobody answers there is no other way to say so.
    late = ["ECONNREFUSED"] if kind == "gvisor" else ["EHOSTUNREACH", "ETIMEDOUT"]
    assert said[0] in [f"ECONNREFUSED ECONNREFUSED {one}" for one in late]
    assert said[1:] == ["ECONNREFUSED", "True", "True 0", "1 b'x' False"]
    assert [each["reason"] for each in one.destinations()][:2] == ["unreachable", "unreachable"]


def test_who_tries_again_has_one_connection(anywhere: NewSession) -> None:
    """gVisor does so itself for a program that waits."""
    code = """
import errno, socket, time
place = ("203.0.113.10", 9000)
sock = socket.create_connection(place)
print(errno.errorcode[sock.connect_ex(place)])
sock = socket.socket()
sock.setblocking(False)
tries = [sock.connect_ex(place)]
while tries[-1] not in (0, errno.EISCONN):
    tries.append(sock.connect_ex(place))
print({errno.errorcode.get(one, "") for one in tries} <= {"EINPROGRESS", "EALREADY", "EISCONN", ""})
sock.setblocking(True)
sock.send(b"x"); print(sock.recv(10))
"""
    one = anywhere()
    assert one.says(code) == "EISCONN\nTrue\nb'x'\n"
    assert [each["connections"] for each in one.destinations()] == [2]


def test_an_eye_for_each_family(session: NewSession) -> None:
    """The name has an IPv6 address where nobody is, and an IPv4 one where somebody is."""
    python = """
import asyncio, time
async def main():
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("both.test", 9000, happy_eyeballs_delay=0.25)
    writer.write(b"seen"); print((await reader.read(10)).decode())
asyncio.run(main())
"""
    node = """
const sock = require('node:net').connect(9000, 'both.test', () => sock.write('seen'));
sock.on('data', (data) => { console.log(`${data}`); sock.end(); });
"""
    for language, code in (("python", python), ("node", node)):
        one = session(language)
        assert one.says(code, timeout=120) == "seen\n"


def test_who_does_not_wait_is_not_told_that_nobody_is_somebody(session: NewSession) -> None:
    code = """
import socket, time
began = time.monotonic()
try: socket.create_connection(("203.0.113.99", 80), 1); print("connected")
except OSError as error: print(type(error).__name__, 0.9 < time.monotonic() - began < 8)
sock = socket.socket()
sock.setblocking(False)
sock.connect_ex(("203.0.113.99", 80))
import select
select.select([], [sock], [], 20)
print(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0)
"""
    assert session().says(code, timeout=60).splitlines() == ["TimeoutError True", "True"]


@outside
def test_a_server_that_is_slow_to_answer_is_reached(anywhere: NewSession, machine: Machine) -> None:
    """Its address is there only after the first tries: as long as that the machine's kernel asks for it in vain."""
    code = """
import asyncio, time
async def one():
    reader, writer = await asyncio.open_connection("203.0.113.98", 9000)
    writer.write(b"x"); print(await reader.read(10))
async def main():
    print("go", flush=True)
    await asyncio.gather(one(), one(), one())
asyncio.run(main())
"""
    one = anywhere()
    appear = threading.Timer(1.2, machine.in_the_world, ["addr", "add", "203.0.113.98/32", "dev", "in"])
    appear.start()
    assert one.says(code, timeout=60) == "go\n" + "b'x'\n" * 3
    appear.join()
    machine.in_the_world("addr", "del", "203.0.113.98/32", "dev", "in")


@outside
def test_200_connections_at_a_time(anywhere: NewSession) -> None:
    code = """
import asyncio
async def one(n):
    reader, writer = await asyncio.open_connection("203.0.113.10" if n % 2 else "198.51.100.7", 9000)
    writer.write(b"%d" % n)
    assert await reader.read(10) == b"%d" % n
    await go.wait()
    writer.write(b"more")
    assert await reader.read(10) == b"more"
    writer.close()
async def main():
    global go
    go = asyncio.Event()
    tasks = [asyncio.create_task(one(n)) for n in range(200)]
    await asyncio.sleep(0.5)
    go.set()
    await asyncio.gather(*tasks)
    print("all")
asyncio.run(main())
"""
    one = anywhere()
    assert one.says(code, timeout=60) == "all\n"
    assert sum(each["connections"] for each in one.destinations()) == 200


def test_one_more_than_there_may_be_is_refused_and_room_comes_back(session: NewSession) -> None:
    code = """
import socket
held = [socket.create_connection(("203.0.113.10", 9000)) for _ in range(256)]
try: socket.create_connection(("203.0.113.10", 9000))
except OSError as error: print(error.strerror)
for one in held: one.close()
import time
for _ in range(100):
    try: socket.create_connection(("203.0.113.10", 9000)); break
    except OSError: time.sleep(0.05)
else: raise SystemExit("no room")
"""
    assert session().says(code, timeout=60) == "No buffer space available\n"


@outside
def test_threads_and_processes_of_a_program_may_all_connect(anywhere: NewSession) -> None:
    code = """
import socket, subprocess, sys, threading
def ask(n):
    sock = socket.create_connection(("203.0.113.10", 9000))
    sock.send(b"x"); said.append(sock.recv(5))
said = []
threads = [threading.Thread(target=ask, args=(n,)) for n in range(50)]  # more than there are sockets in a batch
for one in threads: one.start()
for one in threads: one.join()
print(said == [b"x"] * 50)
code = "import socket; sock = socket.create_connection(('203.0.113.10', 9000)); sock.send(b'child'); "
code += "print(sock.recv(9).decode())"
print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
"""
    assert anywhere().says(code) == "True\nchild\n\n"


KEEPS_COPIES = """
from era.drivers.socket_broker import SocketBroker
new_socket, copies = SocketBroker.new_socket, []
async def new(*given):
    sock = await new_socket(*given)
    copies.append(sock.dup())
    return sock
SocketBroker.new_socket = new
"""


def test_a_copy_of_a_listener_is_in_nobody_s_way(machine: Machine, tmp_path: Path) -> None:
    """PID 1 of a sandbox has one of each until it gets to close it."""
    server = machine.serve(tmp_path / "data", weakness=KEEPS_COPIES)
    code = """
import socket
for _ in range(5):
    sock = socket.create_connection(("203.0.113.10", 9000))
    sock.send(b"x"); print(sock.getpeername(), sock.recv(5))
"""
    with server.client() as http:
        assert new_session(http).says(code).splitlines() == ["('203.0.113.10', 9000) b'x'"] * 5
    server.stop()


def test_a_port_that_a_program_serves_itself_can_be_reached_elsewhere(anywhere: NewSession) -> None:
    code = """
import asyncio, os, socket
server = socket.create_server(("0.0.0.0", 9000))
sock = socket.create_connection(("203.0.113.10", 9000))
sock.send(b"blocking"); print(sock.recv(10), os.get_blocking(sock.fileno()))
async def main():
    for host in ("203.0.113.10", "::ffff:198.51.100.7"):
        reader, writer = await asyncio.open_connection(host, 9000)
        writer.write(b"x"); print(await reader.read(10))
asyncio.run(main())
own = socket.create_connection(("127.0.0.1", 9000))
server.accept()[0].send(b"mine"); print(own.recv(10))
server.close()
socket.create_server(("0.0.0.0", 9000)).close()  # and nothing of ours is in the way
bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
bound.bind(("0.0.0.0", 9000))
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(5)
sock.connect(("203.0.113.10", 9000)); sock.send(b"datagram"); print(sock.recv(10))
"""
    assert anywhere().says(code).splitlines() == ["b'blocking' True", "b'x'", "b'x'", "b'mine'", "b'datagram'"]


@outside
def test_50_mib_in_and_out(anywhere: NewSession) -> None:
    code = """
import hashlib, http.client
connection = http.client.HTTPConnection("www.example.test")
connection.request("GET", "/big?mb=50")
answer, digest, size = connection.getresponse(), hashlib.sha256(), 0
while piece := answer.read(1 << 18):
    digest.update(piece); size += len(piece)
print(size, digest.hexdigest())
connection = http.client.HTTPConnection("www.example.test")
connection.request("POST", "/upload", (bytes(range(256)) * 256 for _ in range(800)), {"Content-Length": str(50 << 20)})
print(connection.getresponse().read().decode())
"""
    digest = hashlib.sha256(world.CHUNK * 800).hexdigest()
    one = anywhere()
    first, second = one.says(code, timeout=60).splitlines()
    assert first == f"{50 << 20} {digest}"
    assert json.loads(second) == {"size": 50 << 20, "sha256": digest}
    (found,) = one.destinations()
    assert found["sent"] > 50 << 20
    assert found["received"] > 50 << 20


def test_what_a_server_does_not_take_stays_with_the_program(session: NewSession) -> None:
    """The echo waits for us to read, and we don't."""
    code = """
import socket
sock = socket.create_connection(("www.example.test", 9000))
sock.settimeout(1)
sent = 0
try:
    while sent < 1 << 30: sent += sock.send(bytes(1 << 20))
except TimeoutError: pass
print(sent < 256 << 20)
"""
    assert session().says(code) == "True\n"


# -- ending -----------------------------------------------------------------------------------------------------


def test_everything_ends_with_its_run(anywhere: NewSession, served: NetServer) -> None:
    code = """
import os, socket
held = []
for n in range(20):
    sock = socket.create_connection(("www.example.test", 80))
    sock.sendall(b"GET /hang HTTP/1.1\\r\\n\\r\\n")
    held.append(sock)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.sendto(b"x", ("203.0.113.10", 9000))
    held.append(sock)
if os.fork() == 0:
    os.setsid()
    while True: pass
"""
    later = """
import socket, urllib.request
sock = socket.socket()
try: sock.bind(("203.0.113.10", 0)); print("still there")
except OSError as error: print(error.strerror)
print(urllib.request.urlopen("http://www.example.test/open").read().decode())
"""
    one = anywhere()
    for _ in range(2):
        one.says(code)
        address, still_open = one.says(later).splitlines()
        assert address == "Cannot assign requested address"
        # The server counts its connections down in threads of its own.
        assert still_open == "0" or eventually(lambda: one.says(later).splitlines()[1] == "0")
    before = len(os.listdir(f"/proc/{served.pid}/fd"))
    for _ in range(2):
        one.says(code)
    assert eventually(lambda: len(os.listdir(f"/proc/{served.pid}/fd")) <= before + 2)
