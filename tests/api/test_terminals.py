"""Terminals and attached processes over WebSockets, and who may not have them."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from socket import SHUT_WR

import httpx
import pytest

from tests.api.live import PATIENCE, Terminal, ended, output, process, refusal, socket, start
from tests.api.owners import OPERATOR_KEY, Owners, client_with_key
from tests.conftest import MakeSession, Server, eventually
from tests.gvisor import BOTH_KINDS, of_kind


def test_a_shell_with_job_control(client: httpx.Client, session: MakeSession, server: Server) -> None:
    where = session()
    with socket(server, f"{where}/terminal?cols=100&rows=30") as opened:
        shell = Terminal(opened)
        attached = shell.until_event("attached")
        assert attached["after"] == 0
        shell.send("PS1='> '; stty size; tty; echo $TERM $0\n")
        shell.until("30 100\r\n")
        shell.until("/dev/pts/")
        shell.until("xterm-256color")
        prompt = "\x1b[?2004h> "
        shell.until(prompt)  # before it, bash reads the terminal's size and sets what it read, which undoes a new one
        shell.control(resize={"cols": 120, "rows": 40})
        shell.send("stty size\n")
        shell.until("40 120\r\n")
        shell.send("sh -c 'echo go\"\"ing; exec sleep 1000'\n")  # what it prints tells that it is in the foreground
        shell.until("going")
        shell.send(b"\x1a")
        shell.until("Stopped")
        shell.send("jobs; bg %1; kill %1; wait; echo do''ne\n")
        shell.until("done\r\n")
        shell.send("stty -echoctl; echo re''ady; cat\n")
        shell.until("ready\r\n")
        shell.send("hällo €\n")
        shell.until("hällo €\r\nhällo €\r\n")
        prompts = shell.shown.count(prompt.encode())
        shell.send(b"\x03")
        shell.until(prompt, prompts + 1)  # bash forgets what is typed between that and its prompt
        shell.send("exit 7\n")
        assert shell.until_event("exit")["exit_code"] == 7
        assert shell.until_closed() == 1000
    assert ended(client, where, attached["process_id"])["exit_code"] == 7


def test_whoever_comes_back_misses_nothing_and_gets_nothing_twice(
    client: httpx.Client, session: MakeSession, server: Server
) -> None:
    where = session()
    count = "stty raw -echo; i=0; while [ $i -lt 4000 ]; do i=$((i+1)); echo $i; done; sleep 1000"
    name = start(client, where, ["bash", "-c", count], pty={"cols": 80, "rows": 24})
    got, after = b"", 0
    while b"4000\r\n" not in got and b"4000\n" not in got:
        with socket(server, f"{where}/processes/{name}/attach?after={after}") as opened:
            part = Terminal(opened)
            assert part.until_event("attached")["after"] == after
            for _ in range(3):
                part.take()
                if b"4000" in part.shown:
                    break
            got += part.shown
            after += len(part.shown)
    assert got.split() == [str(n).encode() for n in range(1, 4001)]
    with socket(server, f"{where}/terminal?process={name}") as opened:
        again = Terminal(opened)
        again.until("4000")
        assert again.shown.split() == got.split(), "all that is kept comes again"


def test_attached_to_a_process_without_a_terminal(client: httpx.Client, session: MakeSession, server: Server) -> None:
    where = session()
    name = start(client, where, "cat; echo to-err >&2; exit 2", stdin=True)
    with socket(server, f"{where}/processes/{name}/attach") as opened:
        attached = Terminal(opened)
        attached.send("x" * 100_000)
        attached.send("é")
        attached.control(eof=True)
        assert attached.until_event("exit") == {
            "type": "exit", "id": 100_010, "exit_code": 2, "signal": None, "reason": None
        }  # fmt: skip
        outs = [event for event in attached.events if event["type"] == "stdout"]
        assert "".join(event["content"] for event in outs) == "x" * 100_000 + "é"
        assert attached.until_closed() == 1000
    with socket(server, f"{where}/processes/{name}/attach?after=100009") as opened:
        late = Terminal(opened)
        late.send("too late")
        assert late.until_closed() == 1000
        assert [event["type"] for event in late.events][:1] == ["attached"]
        assert "exit" in {event["type"] for event in late.events}


@pytest.mark.parametrize("path", ["terminal/", "terminal/?cols=80", "processes/{name}/attach/"])
def test_a_slash_at_the_end_is_as_without(
    client: httpx.Client, session: MakeSession, server: Server, path: str
) -> None:
    where = session()
    name = start(client, where, ["sleep", "1000"])
    with socket(server, f"{where}/{path.format(name=name)}") as opened:
        assert opened.accepted, opened.head
        assert Terminal(opened).until_event("attached")["after"] == 0


def test_what_was_sent_before_the_end_is_read_by_a_slow_process(
    client: httpx.Client, session: MakeSession, server: Server
) -> None:
    """The client is gone before the process has read all, and the end of its input is behind that."""
    where = session()
    slow = """
import sys, time
n = 0
while piece := sys.stdin.buffer.read1(1024):
    n += len(piece)
    time.sleep(0.002)
print(n)
"""
    name = start(client, where, ["python3", "-c", slow], stdin=True)
    with socket(server, f"{where}/processes/{name}/attach") as opened:
        attached = Terminal(opened)
        attached.send(b"x" * 300_000)
        attached.control(eof=True)
        opened.send((1000).to_bytes(2, "big"), opcode=8)
        assert attached.until_closed() == 1000
    ended(client, where, name)
    assert output(client, where, name) == b"300000\n"


FREQUENT_PINGS = """
import era.api.websocket
era.api.websocket.PING_SECONDS = 0.2
"""


@pytest.mark.parametrize(
    ("closes", "writes"),
    [
        pytest.param(False, True, id="hung up-the process writes"),
        pytest.param(True, False, id="closed-a ping comes", marks=pytest.mark.soak),
        pytest.param(True, True, id="closed-the process writes", marks=pytest.mark.soak),
        pytest.param(False, False, id="hung up-a ping comes", marks=pytest.mark.soak),
    ],
)
def test_what_was_sent_by_a_client_that_is_gone_is_read(tmp_path: Path, writes: bool, closes: bool) -> None:
    """The server can send nothing any more, and has more to write to the process than it has read."""
    server = Server(tmp_path / "data", {}, weakness=FREQUENT_PINGS)
    server.start()
    try:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            client.post("/api/sessions", json={"language": "bash", "session_id": "a"})
            slow = f"for i in 1 2 3 4 5 6; do sleep 0.5; {'echo tick' if writes else ':'}; done; wc -c"
            name = start(client, "a", slow, stdin=True)
            with socket(server, f"a/processes/{name}/attach") as opened:
                attached = Terminal(opened)
                attached.send(b"x" * 200_000)
                attached.control(eof=True)
                if closes:
                    opened.send((1000).to_bytes(2, "big"), opcode=8)
                opened.socket.shutdown(SHUT_WR)
                opened.rest()  # the server has seen that
            assert ended(client, "a", name)["exit_code"] == 0
            assert output(client, "a", name).split()[-1] == b"200000"
    finally:
        server.stop()


def test_nonsense_from_a_client_disturbs_nothing(client: httpx.Client, session: MakeSession, server: Server) -> None:
    where = session()
    name = start(client, where, "cat", stdin=True)
    for message in ("x", "[]", "{}", '{"resize": 1}', '{"resize": {"cols": 0, "rows": 1}}', '{"signal": "NOPE"}',
                    '{"a": 1, "b": 2}', '{"eof": false}', "[" * 5000):  # fmt: skip
        with socket(server, f"{where}/processes/{name}/attach") as opened:
            attached = Terminal(opened)
            opened.send(message.encode(), opcode=1)
            assert attached.until_event("error")["code"] in ("bad_message", "bad_request")
    frames = [(b"\xff", 1), (b"x" * 200, 9), (b"x" * (1 << 20) + b"y", 2), (b"x", 0), (b"x", 3)]
    for payload, opcode in frames:
        with socket(server, f"{where}/processes/{name}/attach") as opened:
            attached = Terminal(opened)
            opened.send(payload, opcode=opcode)
            assert attached.until_closed() in (1002, 1007, 1009)
    with socket(server, f"{where}/processes/{name}/attach") as opened:
        opened.socket.sendall(b"\x82\x01x")  # not masked
        assert Terminal(opened).until_closed() == 1002
    with socket(server, f"{where}/processes/{name}/attach") as opened:
        attached = Terminal(opened)
        opened.send(b"hello", opcode=9)
        while True:
            opcode, payload = opened.receive()
            if opcode == 10:
                assert payload == b"hello"
                break
        attached.send("still here\n")
        attached.control(eof=True)
        attached.until_event("exit")
    assert output(client, where, name) == b"still here\n"


def test_a_client_that_does_not_read_holds_up_nobody(
    client: httpx.Client, session: MakeSession, server: Server
) -> None:
    where = session()
    name = start(client, where, "head -c 30000000 /dev/zero | tr '\\0' x", pty={"cols": 80, "rows": 24})
    with socket(server, f"{where}/processes/{name}/attach") as opened:
        assert ended(client, where, name)["output_bytes"] == 30_000_000
        assert server.resident_bytes < 500 << 20
        slow = Terminal(opened)
        assert slow.until_closed() == 1000
        gaps = [event for event in slow.events if event["type"] == "gap"]
        assert gaps
        assert len(slow.shown) + sum(gap["to"] - gap["from"] + 1 for gap in gaps) == 30_000_000


@pytest.mark.skipif(shutil.which("vim") is None, reason="needs vim")
@pytest.mark.parametrize("isolation", BOTH_KINDS)
def test_full_screen_programs(client: httpx.Client, session: MakeSession, server: Server, isolation: str) -> None:
    """A terminal emulator shows what a person would see."""
    pyte = pytest.importorskip("pyte")

    where = session(**of_kind(isolation))
    screen = pyte.Screen(80, 24)
    colour = screen.select_graphic_rendition

    def select_graphic_rendition(*attributes: int, private: bool = False) -> None:
        """Ignore those with a private mark, which are xterm's and no colours."""
        if not private:
            colour(*attributes)

    screen.select_graphic_rendition = select_graphic_rendition
    stream = pyte.ByteStream(screen)
    fed = 0
    with socket(server, f"{where}/terminal?cols=80&rows=24") as opened:
        shell = Terminal(opened)

        def until(text: str) -> None:
            nonlocal fed
            deadline = time.monotonic() + PATIENCE
            while not any(text in line for line in screen.display):
                shell.take(deadline)
                assert shell.code is None
                stream.feed(shell.shown[fed:])
                fed = len(shell.shown)

        shell.send("PS1='> '; clear; vim -u NONE -N notes.txt\r")
        until("[New]")
        shell.send("ihello wörld\x1b")
        until("hello wörld")
        shell.send(":wq\r")
        until("written")
        until("> ")  # what is typed while it ends may be lost
        shell.send("clear; seq 100 | less\r")
        until("23")
        assert [line.strip() for line in screen.display[:23]] == [str(n) for n in range(1, 24)]
        shell.send("G")
        until("(END)")
        assert [line.strip() for line in screen.display[:23]] == [str(n) for n in range(78, 101)]
        shell.send("q")
        until("> ")
        shell.send("clear; python3 -q; clear; echo left\r")
        until(">>> ")
        shell.send("6 * 7\r")
        until("42")
        shell.send("for letter in 'ab':\r    print(letter * 3)\r\r")
        until("bbb")
        shell.send("exit()\r")
        until("left")
        until("> ")
        if shutil.which("top"):
            shell.send("clear; top\r")
            until("load average")
            shell.send("q")
            until("> ")
        shell.send("exit\r")
        assert shell.until_event("exit")["exit_code"] == 0
        assert shell.until_closed() == 1000
    client.post(f"/api/sessions/{where}/stop")
    assert client.get(f"/api/sessions/{where}/files/notes.txt").text == "hello wörld\n"


FOREIGN = [
    ("Origin: http://evil.example",),
    ("Origin: null",),
    ("Sec-Fetch-Site: cross-site",),
]


def test_pages_of_others_open_none(client: httpx.Client, session: MakeSession, server: Server) -> None:
    where = session()
    name = start(client, where, "exec sleep 1000")
    for headers in FOREIGN:
        for path in (f"{where}/terminal", f"{where}/processes/{name}/attach"):
            assert refusal(server, path, *headers) == (403, "forbidden")
    assert refusal(server, f"{where}/terminal", "Host: evil.example")[0] in (400, 403)
    own = f"Origin: {server.url}"
    assert refusal(server, f"{where}/processes/{name}/attach", own)[0] == 101
    assert client.get(f"/api/sessions/{where}/processes").json()["count"] == 1, "no shell was started"


def test_bad_requests_are_refused_like_any_call(client: httpx.Client, session: MakeSession, server: Server) -> None:
    where = session()
    name = start(client, where, "exec sleep 1000")
    assert refusal(server, "nobodys/terminal") == (404, "not_found")
    assert refusal(server, f"{where}/processes/nobody/attach") == (404, "no_such_process")
    assert refusal(server, f"{where}/terminal?cols=0") == (400, "invalid_field")
    assert refusal(server, f"{where}/terminal?color=1") == (400, "invalid_field")
    assert refusal(server, f"{where}/terminal?process={name}") == (400, "bad_request")
    assert refusal(server, f"{where}/terminal?ticket=guess") == (401, "unauthorized")


def test_owners_and_tickets(owners: Owners) -> None:
    ada, mallory, server = owners.ada, owners.mallory, owners.server
    assert ada.post("/api/sessions", json={"language": "python", "session_id": "hers"}).status_code == 201
    assert mallory.post("/api/sessions", json={"language": "python", "session_id": "mine"}).status_code == 201
    name = start(ada, "hers", "cat", stdin=True)
    paths = [f"hers/processes/{name}/attach", "hers/terminal"]
    key = "Authorization: " + mallory.headers["authorization"]
    for path in paths:
        assert refusal(server, path) == (401, "unauthorized")
        assert refusal(server, path, "Authorization: Bearer guess") == (401, "unauthorized")
        assert refusal(server, path, key)[0] == 404
    assert mallory.post("/api/sessions/hers/tickets").status_code == 404
    mine = mallory.post("/api/sessions/mine/tickets").json()["ticket"]
    assert refusal(server, f"{paths[0]}?ticket={mine}") == (401, "unauthorized")
    assert refusal(server, f"mine/terminal?ticket={mine}") == (401, "unauthorized"), "it was tried, and is used up"

    given = ada.post("/api/sessions/hers/tickets")
    assert given.status_code == 201
    ticket = given.json()["ticket"]
    page = "Origin: https://her-page.example"
    with socket(server, f"{paths[0]}?ticket={ticket}", page) as opened:
        attached = Terminal(opened)
        attached.send("hello\n")
        assert attached.until_event("stdout")["content"] == "hello\n"
        assert refusal(server, f"{paths[0]}?ticket={ticket}") == (401, "unauthorized"), "it is good once"
    assert (
        ada.get(f"/api/sessions/hers?ticket={ada.post('/api/sessions/hers/tickets').json()['ticket']}").status_code
        == 400
    )
    assert ticket not in server.log
    assert eventually(lambda: process(ada, "hers", name)["output_bytes"] == 6)
    ada.delete("/api/sessions/hers?purge=true")
    mallory.delete("/api/sessions/mine?purge=true")


REUSABLE = """
from era.core.live.tickets import Tickets
Tickets.take = lambda self, ticket, session_id: self._tickets[ticket].caller
"""


def test_tickets_that_could_be_used_again_would_be_found(tmp_path: Path) -> None:
    """The same attacks get in at a server whose tickets stay good, for any session."""
    server = Server(tmp_path / "data", {"ERA_API_KEY": OPERATOR_KEY}, weakness=REUSABLE)
    server.start()
    try:
        with client_with_key(server, OPERATOR_KEY) as client:
            for name in ("a", "b"):
                client.post("/api/sessions", json={"language": "python", "session_id": name})
                start(client, name, "exec sleep 1000", tag="p")
            ticket = client.post("/api/sessions/a/tickets").json()["ticket"]
        for name in ("a", "a", "b"):
            assert refusal(server, f"{name}/processes/p/attach?ticket={ticket}") == (101, "")
    finally:
        server.stop()
