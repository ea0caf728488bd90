"""Terminals and attached processes over WebSockets, and who may not have them."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.api.live import Terminal, ended, output, process, refusal, socket, start
from tests.api.owners import OPERATOR_KEY, Owners, client_with_key
from tests.conftest import MakeServer, MakeSession, Server, eventually


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


UNCHECKED = """
from era.api.guard import Guard
from era.core.owners.api_keys import OPERATOR
Guard._check = lambda self, scope, headers: scope["state"].setdefault("caller", OPERATOR)
"""


def test_pages_of_others_would_open_them_at_a_server_without_the_check(own_server: MakeServer) -> None:
    server = own_server(weakness=UNCHECKED)
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        start(client, "s", "exec sleep 1000", tag="p")
        for headers in (*FOREIGN, ("Host: evil.example",)):
            assert refusal(server, "s/processes/p/attach", *headers) == (101, "")


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
from era.core.owners.api_keys import Tickets
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
