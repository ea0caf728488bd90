"""Public URLs of sessions that store code: where they are, who may call, and that each call is a run like any other.

test_proxy_pages.py has the browser's part.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx

from tests.api.stored_code import COUNTER, SEEN, Publish
from tests.api.told import WAITS, tell
from tests.conftest import MakeServer, MakeSession, Run, Server, eventually


def without_id(answer: httpx.Response) -> dict[str, Any]:
    """The body of an error without its request id."""
    body: dict[str, Any] = answer.json()
    del body["request_id"]
    return body


def test_the_public_url_of_a_session(client: httpx.Client, session: MakeSession, server: Server) -> None:
    where = session(session_id="a:b-c_D")
    answer = client.get(f"/api/sessions/{where}/host", params={"port": 8080})
    url = f"{server.url}/proxy/{where}/8080"
    expected = {"url": url, "base_url": server.url, "session_id": where, "port": 8080}
    body = answer.json()
    assert (answer.status_code, body | expected) == (200, body)
    assert body.keys() - expected.keys() == {"label", "site_url"}
    for port in ("?port=0", "?port=65536", "?port=-1", "?port=x", "?port=", "?port=8080.5", ""):
        assert client.get(f"/api/sessions/{where}/host{port}").status_code == 400, port
    assert client.get("/api/sessions/nobody/host?port=1").status_code == 404


def test_the_public_url_as_configured(own_server: MakeServer) -> None:
    server = own_server(public_url="https://era.example/below/")
    with server.client() as client:
        assert client.post("/api/sessions", json={"language": "python", "session_id": "s"}).status_code == 201
        body = client.get("/api/sessions/s/host?port=1").json()
        assert body["url"] == "https://era.example/below/proxy/s/1"
        code = 'print(\'{"headers": {"Set-Cookie": "a=1"}}\')'
        client.put("/api/sessions/s/code", json={"code": code})
        # The configured host name is accepted, and no other.
        answer = client.get("/proxy/s/1/", headers={"Host": "era.example"})
        assert answer.headers["Set-Cookie"] == "era-session-a=1; Path=/below/proxy/s/"
        assert client.get("/proxy/s/1/", headers={"Host": "evil.example"}).status_code == 403


def test_unknown_sessions_are_404(client: httpx.Client, session: MakeSession) -> None:
    known = without_id(client.get("/proxy/nobody/80/x"))
    assert (known["code"], client.get("/proxy/nobody/80/x").status_code) == ("not_found", 404)
    for path in (
        "",
        "/",
        "/nobody",
        "/no%20body/80/",
        "/a%2Fb/80",
        "//80/",
        f"/{'x' * 200}/80",
        "/%00",
        "/%ff/1",
        "/a.b/0",
    ):
        answer = client.get(f"/proxy{path}")
        assert (answer.status_code, without_id(answer)) == (404, known), path
    where = session()
    client.delete(f"/api/sessions/{where}")
    assert client.get(f"/proxy/{where}/80/").status_code == 404


def test_private_sessions_refuse_public_calls(client: httpx.Client, publish: Publish) -> None:
    url = publish(COUNTER, allowPublicAccess=False)
    where = url.split("/")[2]
    for path in (f"{url}/x", url, f"/proxy/{where}", f"/proxy/{where}/nonsense"):
        assert client.post(path).status_code == 403, path
    assert client.post(url).json()["code"] == "not_public"
    assert client.get(f"/api/sessions/{where}/runs").json()["count"] == 0
    assert client.patch(f"/api/sessions/{where}", json={"allowPublicAccess": True}).status_code == 200
    assert client.post(url).status_code == 201
    # The owner's own calls need no public access.
    assert client.patch(f"/api/sessions/{where}", json={"allowPublicAccess": False}).status_code == 200
    assert client.post(f"/api/sessions/{where}/run", json={}).status_code == 200


def test_a_waiting_call_is_refused_when_its_session_becomes_private(
    client: httpx.Client, publish: Publish, server: Server
) -> None:
    """The setting counts that the session has when the call gets its turn."""
    url = publish(COUNTER)
    where = url.split("/")[2]
    answers: list[int] = []

    def call() -> None:
        with server.client() as other:
            answers.append(other.post(url).status_code)

    def hold() -> None:
        with server.client() as other:
            other.post(f"/api/sessions/{where}/run", json={"code": WAITS, "timeout": 120})

    holding, calling = threading.Thread(target=hold), threading.Thread(target=call)
    holding.start()
    assert eventually(lambda: client.get(f"/api/sessions/{where}").json()["status"] == "running")
    calling.start()
    time.sleep(0.3)
    assert client.patch(f"/api/sessions/{where}", json={"allowPublicAccess": False}).status_code == 200
    tell(client)
    holding.join()
    calling.join()
    assert answers == [403]


def test_missing_code_and_bad_ports_are_400(client: httpx.Client, publish: Publish) -> None:
    answer = client.get(f"{publish(None)}/x")
    assert (answer.status_code, answer.json()["code"]) == (400, "no_code")
    assert answer.json()["hint"] == "Use PUT /api/sessions/{id}/code to store code"
    where = publish(SEEN).split("/")[2]
    for port in ("0", "65536", "http", "%33000", "99999999999", "-1", "3000%2Fx"):
        assert client.get(f"/proxy/{where}/{port}/x").status_code == 400, port


def test_public_calls_are_runs(client: httpx.Client, publish: Publish, run: Run) -> None:
    url = publish(COUNTER)
    where = url.split("/")[2]
    answers = [client.post(f"{url}/hook") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [201] * 3
    assert [answer.headers["X-Calls"] for answer in answers] == ["1", "2", "3"]
    body = client.get(f"/api/sessions/{where}").json()
    assert (body["data"]["calls"], body["file_count"]) == (3, 1)
    records = client.get(f"/api/sessions/{where}/runs").json()["runs"]
    assert [record["run_id"] for record in records] == [answer.headers["X-Era-Run"] for answer in reversed(answers)]
    assert [record["state"]["version"] for record in records] == [4, 3, 2]
    assert run(where, "print(open('calls.txt').read())")["stdout"] == "xxx\n"


def test_public_calls_need_no_key_and_forward_none(own_server: MakeServer) -> None:
    server = own_server(api_key="open sesame")
    with server.client() as client:
        key = {"Authorization": "Bearer open sesame"}
        assert client.post("/api/sessions", json={"language": "python", "session_id": "s"}, headers=key).is_success
        assert client.put("/api/sessions/s/code", json={"code": SEEN}, headers=key).is_success
        assert client.get("/api/sessions/s/host?port=1").status_code == 401
        for headers in ({}, key, {"Authorization": "Basic b3BlbiBzZXNhbWU="}, {"Host": "any.example"}):
            answer = client.get("/proxy/s/1/", headers=headers)
            assert answer.status_code == 200
            assert "sesame" not in answer.text
            assert "authorization" not in answer.text
        run = client.post("/api/sessions/s/run", json={"code": "import os; print(dict(os.environ))"}, headers=key)
        assert "sesame" not in run.text


def test_public_calls_come_from_any_origin_but_to_our_host_only(client: httpx.Client, publish: Publish) -> None:
    url = publish("print('served')")
    foreign = [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Referer": "http://127.0.0.1/proxy/x/3000/"},
    ]
    assert client.get("/api/sessions").status_code == 200
    for headers in foreign:
        assert client.post(url, headers=headers).text == "served\n"
        assert client.get("/api/sessions", headers=headers).status_code == 403, headers
    assert client.get(url, headers={"Host": "rebound.example"}).status_code == 403
    for referer in ("http://x/%70roxy/y", "http://x/proxy", "http://x:1/proxy?x"):
        assert client.get("/api/sessions", headers={"Referer": referer}).status_code == 403, referer
    assert client.get("/api/sessions", headers={"Referer": f"{client.base_url}/docs"}).status_code == 200
