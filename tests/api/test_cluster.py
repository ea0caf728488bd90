"""Several hosts that share their sessions: any host takes any call, and a session survives its host."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.api.guest_servers import HTTP_SERVER, serve_in_background
from tests.api.live import Terminal, start
from tests.api.websocket import WebSocket
from tests.client.command import era
from tests.cluster import KEY, LEASE_SECONDS, Cluster, History, running
from tests.conftest import Server, eventually
from tests.soaking import soak_the_rest
from tests.table import table

EFFECTIVE_SECONDS = 60
"""How long a test waits at most for what a busy machine may delay; what it waits for takes a few seconds."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("hosts") / "cluster") as cluster:
        yield cluster


@pytest.fixture
def hosts(cluster: Cluster) -> Iterator[list[httpx.Client]]:
    with cluster.clients() as clients:
        yield clients


def made(client: httpx.Client, name: str, **fields: object) -> str:
    """A session that is at home at this client's host."""
    assert client.post("/api/sessions", json={"session_id": name, "language": "python", **fields}).status_code == 201
    assert run(client, name, "print('home')")["stdout"] == "home\n"
    return name


def run(client: httpx.Client, session: str, code: str, **fields: object) -> dict[str, object]:
    answer = client.post(f"/api/sessions/{session}/run", json={"code": code, **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, object] = answer.json()
    return body


def test_any_host_takes_any_call(cluster: Cluster, hosts: list[httpx.Client]) -> None:
    home, other = hosts
    session = made(home, "anywhere")
    # One sandbox, whichever host is asked: a process's memory is there for both.
    assert run(other, session, "open('f', 'w').write('x'); print(1)")["stdout"] == "1\n"
    assert run(home, session, "print(open('f').read())", record_code=False)["stdout"] == "x\n"
    for host in hosts:
        records = host.get(f"/api/sessions/{session}/runs").json()["runs"]
        assert [record["code"] for record in records] == [None, "open('f', 'w').write('x'); print(1)", "print('home')"]
    large = os.urandom(3 << 20)
    path, upload = f"/api/sessions/{session}/files/large", io.BytesIO(large)
    assert other.put(path, content=upload).json() == {"path": "large", "size": len(large)}
    for host in hosts:
        is_same = host.get(path).content == large
        assert is_same
    with other.stream("GET", f"/api/sessions/{session}/files/large", headers={"Range": "bytes=5-9"}) as part:
        assert (part.status_code, part.read()) == (206, large[5:10])
    refused = other.get(f"/api/sessions/{session}/files/none")
    assert (refused.status_code, refused.json()["code"]) == (404, "no_file")
    assert refused.json()["request_id"] == refused.headers["x-request-id"]
    assert other.get(f"/api/sessions/{session}/files/none", headers={"Authorization": "Bearer no"}).status_code == 401


def test_streams_and_sockets_are_passed_on(cluster: Cluster, hosts: list[httpx.Client]) -> None:
    home, other = hosts
    session = made(home, "streams")
    code = "import sys\nprint('begun', flush=True)\nsys.stdin.read()"
    answer = other.post(f"/api/sessions/{session}/processes", json={"command": ["cat"], "stdin": True})
    assert answer.status_code == 201, answer.text
    process = answer.json()["process_id"]
    ticket = other.post(f"/api/sessions/{session}/tickets").json()["ticket"]
    # A ticket is good at any host, once.
    path = f"/api/sessions/{session}/processes/{process}/attach?ticket={ticket}"
    socket = WebSocket(cluster.server(1), path)
    assert socket.accepted, socket.head
    refused = WebSocket(cluster.server(1), path)
    refused.close()
    assert not refused.accepted
    socket.send(b"over two hosts\n")
    shown = ""
    while "over two hosts" not in shown:
        shown += socket.receive()[1].decode()
    socket.close()
    with other.stream("GET", f"/api/sessions/{session}/processes/{process}/events") as events:
        for line in events.iter_lines():
            if "over two hosts" in line:
                break
    assert other.delete(f"/api/sessions/{session}/processes/{process}").status_code == 200
    with other.stream("POST", f"/api/sessions/{session}/stream", json={"code": code}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert "begun" in "".join(stream.iter_lines())


def test_a_public_url_is_passed_on(hosts: list[httpx.Client]) -> None:
    home, other = hosts
    session = made(home, "public", allowPublicAccess=True)
    serve_in_background(home, session, HTTP_SERVER)
    answer = other.get(f"/proxy/{session}/3000/x", headers={"Authorization": "Basic own"})
    assert answer.status_code == 200, answer.text
    assert "x-era-hop" not in answer.text.lower()


@table("header", ["", "x", "e30=.00", "e30.", "." * 9000])
def test_nobody_else_passes_calls_on(hosts: list[httpx.Client], header: str) -> None:
    answer = hosts[0].get("/api/sessions", headers={"X-Era-Hop": header})
    assert (answer.status_code, answer.json()["code"]) == (403, "bad_hop")


SEES_NOBODY = """
from era.core.cluster.homes import Homes
async def check_alone_at(self, url): pass
Homes.check_alone_at = check_alone_at
"""


@pytest.mark.parametrize("seen", soak_the_rest(["before it joins", "once it has told its own"], 1))
def test_a_host_with_the_address_of_another_one_does_not_start(cluster: Cluster, tmp_path: Path, seen: str) -> None:
    """Also where the other one has only told its address when this one had looked."""
    url = cluster.told()[0]["url"]
    (tmp_path / "sitecustomize.py").write_text(SEES_NOBODY)
    settings = {
        "ERA_SHARED_DIR": str(cluster.directory / "shared"),
        "ERA_CLUSTER_SECRET": (cluster.directory / "secret").read_text().strip(),
        "ERA_DATA_DIR": str(cluster.directory / "another"),
        "ERA_LEASE_SECONDS": str(LEASE_SECONDS),
        "ERA_HOST_URL": url,
        "ERA_PORT": "0",
    } | ({"PYTHONPATH": str(tmp_path)} if seen == "once it has told its own" else {})
    told = era(None, "serve", code=2, env=settings).stderr.splitlines()
    assert [line for line in told if line.startswith("era: ")] == [
        f"era: Another host of this cluster is at {url}, too: give each an address of its own, with ERA_HOST and "
        "ERA_PORT, or ERA_HOST_URL."
    ]


def test_a_session_survives_its_host(cluster: Cluster, hosts: list[httpx.Client]) -> None:
    home, other = hosts
    session = made(home, "killed")
    run(home, session, "open('f', 'w').write('kept')")
    with ThreadPoolExecutor(1) as thread:
        lost_code = "open('f', 'w').write('half')\nimport time; time.sleep(1000)"
        lost = thread.submit(other.post, f"/api/sessions/{session}/run", json={"code": lost_code, "timeout": 1000})
        runs = f"/api/sessions/{session}/runs"
        assert eventually(lambda: other.get(runs).json()["runs"][0]["status"] == "running")  # it is on record
        killed = cluster.pid(0)
        cluster.kill(0)
        answer = lost.result(EFFECTIVE_SECONDS)
    assert (answer.status_code, answer.json()["code"]) == (503, "home_lost")
    assert "Retry-After" not in answer.headers, "clients would send it again by themselves"
    body = {"code": "print(open('f').read())"}
    answers: list[httpx.Response] = []

    def works() -> bool:
        answers.append(other.post(f"/api/sessions/{session}/run", json=body))
        return answers[-1].status_code == 200

    assert eventually(works), answers[-1].text
    assert answers[-1].json()["stdout"] == "kept\n"
    records = other.get(f"/api/sessions/{session}/runs").json()["runs"]
    assert [(each["status"], each["code"]) for each in records[:2]] == [("ok", body["code"]), ("lost", lost_code)]
    assert eventually(lambda: cluster.pid(0) != killed and cluster.is_ready(0))
    with cluster.clients() as [again, _]:
        assert run(again, session, "print(open('f').read())")["stdout"] == "kept\n"


def test_a_host_that_stops_gives_its_sessions_away(cluster: Cluster, hosts: list[httpx.Client]) -> None:
    home, other = hosts
    session = made(home, "drained")
    started = other.post(f"/api/sessions/{session}/processes", json={"command": "echo $$ > pid; exec sleep 1000"})
    process = started.json()["process_id"]
    assert eventually(lambda: other.get(f"/api/sessions/{session}/files/pid").status_code == 200)
    ticket = other.post(f"/api/sessions/{session}/tickets").json()["ticket"]
    attached = Terminal(
        WebSocket(cluster.server(1), f"/api/sessions/{session}/processes/{process}/attach?ticket={ticket}")
    )
    attached.until_event("attached")
    stopped = cluster.pid(0)
    os.kill(stopped, signal.SIGTERM)
    assert attached.until_event("exit")["reason"] == "moved"
    assert attached.until_closed() == 1012
    attached.connection.close()
    body = {"code": "print(open('pid').read() > '')"}
    assert eventually(lambda: other.post(f"/api/sessions/{session}/run", json=body).status_code == 200)
    record = other.get(f"/api/sessions/{session}/processes/{process}").json()
    assert (record["status"], record["reason"]) == ("ended", "moved")
    assert eventually(lambda: cluster.pid(0) != stopped and cluster.is_ready(0))


def test_a_paused_host_commits_nothing(cluster: Cluster) -> None:
    with cluster.clients() as [home, other]:
        session, watched = made(home, "paused"), made(home, "watched")
        process = start(home, watched, "exec sleep 1000")
        path = f"/api/sessions/{watched}/processes/{process}/attach"
        attached = Terminal(WebSocket(cluster.server(1), path, f"Authorization: Bearer {KEY}"))
        attached.until_event("attached")
        code = "open('f', 'w').write('late')\nimport time; time.sleep(4)"
        with ThreadPoolExecutor(1) as thread:
            late = thread.submit(home.post, f"/api/sessions/{session}/run", json={"code": code})
            assert eventually(lambda: other.get(f"/api/sessions/{session}").json()["status"] == "running")
            body = {"code": "open('f', 'w').write('new')"}
            with cluster.paused(0) as paused:
                assert eventually(lambda: other.post(f"/api/sessions/{session}/run", json=body).status_code == 200)
                assert attached.until_closed() == 1012
            attached.connection.close()
            assert isinstance(late.exception(EFFECTIVE_SECONDS), httpx.HTTPError) or late.result().status_code == 503
        assert eventually(lambda: cluster.pid(0) != paused), "the host that was declared dead goes on"
        assert run(other, session, "print(open('f').read())")["stdout"] == "new\n"
        statuses = [each["status"] for each in other.get(f"/api/sessions/{session}/runs").json()["runs"]]
        assert statuses == ["ok", "ok", "lost", "ok"]
    assert "host_lost" in cluster.log(0)
    assert eventually(lambda: cluster.is_ready(0))


@dataclass
class Balanced:
    """The hosts as a load balancer knows them, which calls none that is about to stop."""

    cluster: Cluster
    stopping: int = -1
    chosen: dict[int, int] = field(default_factory=dict)
    """By thread, which host was about to stop when it last chose one."""

    def told(self) -> list[dict[str, object]]:
        return [each for number, each in enumerate(self.cluster.told()) if number != self.stopping]

    def server(self, number: int) -> Server:
        self.chosen[threading.get_ident()] = self.stopping
        return Server(self.cluster.directory, url=str(self.told()[number % len(self.told())]["url"]))


def test_no_call_fails_while_one_host_after_the_other_is_started_anew(cluster: Cluster) -> None:
    """As for an upgrade. Sessions go to other hosts and come back, with calls for them under way all the time."""
    balanced = Balanced(cluster)
    with cluster.clients() as clients:
        sessions = [made(clients[number % 2], f"rolling{number}") for number in range(6)]
        history = History(balanced, sessions)
        threads = [threading.Thread(target=history.append, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for number in range(2):
            before, pid = len(history.answered), cluster.pid(number)
            assert eventually(partial(lambda before: len(history.answered) > before + 12, before))
            balanced.stopping = number
            assert eventually(partial(lambda number: {*balanced.chosen.values()} == {number}, number))
            os.kill(pid, signal.SIGTERM)
            assert eventually(partial(lambda number, pid: cluster.pid(number) != pid, number, pid))
            assert eventually(partial(cluster.is_ready, number))
            balanced.stopping = -1
        before = len(history.answered)
        assert eventually(lambda: len(history.answered) > before + 12)
        history.stop.set()
        for thread in threads:
            thread.join(EFFECTIVE_SECONDS)
    with cluster.clients() as [client, _]:
        history.check(client)
    assert (history.unknown, history.lost) == (0, [])
