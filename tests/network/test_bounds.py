"""Connections end with their run, however that ends, and when nothing moves on them."""

from __future__ import annotations

from tests.conftest import eventually
from tests.network.conftest import NetServer, NewSession, new_session

OPEN = "http://www.example.test/open"


def open_requests(session: object) -> int:
    code = f"import urllib.request; print(urllib.request.urlopen({OPEN!r}).read().decode())"
    return int(session.says(code))  # type: ignore[attr-defined]


def test_a_run_that_is_out_of_time_loses_its_connections_too(session: NewSession) -> None:
    code = """
import urllib.request
urllib.request.urlopen("http://www.example.test/hang").read()
"""
    assert session().run(code, timeout=0.5)["status"] == "timeout"
    assert eventually(lambda: open_requests(session()) == 0)


def test_a_deleted_session_loses_its_connections_at_once(session: NewSession, served: NetServer) -> None:
    one = session()
    stream = (
        "import urllib.request; print('go', flush=True); urllib.request.urlopen('http://www.example.test/hang').read()"
    )
    with (
        served.client() as client,
        client.stream("POST", f"/api/sessions/{one.id}/stream", json={"code": stream, "timeout": 60}) as answer,
    ):
        for line in answer.iter_lines():
            if "go" in line:
                break
        assert eventually(lambda: open_requests(session()) == 1)
        with served.client() as other:
            other.delete(f"/api/sessions/{one.id}")
        assert eventually(lambda: open_requests(session()) == 0)


def test_a_connection_on_which_nothing_moves_is_closed(odd: NetServer) -> None:
    code = """
import socket, time
idle = socket.create_connection(("www.example.test", 6379), 25)
began = time.monotonic()
print(idle.recv(10), 0.5 < time.monotonic() - began < 20)
"""
    with odd.client() as client:
        assert new_session(client).says(code) == "b'' True\n"
