"""Two owners on one server, and what one of them tries with the sessions and storage of the other."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from typing import Any

import httpx

from tests.conftest import Server, eventually

OPERATOR_KEY = "the operator's own key"
SECRET = "canary-7c1d90"


def client_with_key(server: Server, key: str) -> httpx.Client:
    """A client that sends this API key."""
    return server.client(headers={"Authorization": f"Bearer {key}"})


def new_key(server: Server, owner: str) -> dict[str, Any]:
    """Make an API key of an owner; returns the answer, which has the key itself."""
    with client_with_key(server, OPERATOR_KEY) as operator:
        answer = operator.post("/api/keys", json={"owner": owner})
    assert answer.status_code == 201, answer.text
    body: dict[str, Any] = answer.json()
    return body


@dataclass
class Owners:
    """Clients of one server: of two owners, and of its operator."""

    server: Server
    operator: httpx.Client
    ada: httpx.Client
    mallory: httpx.Client

    @classmethod
    def of(cls, server: Server) -> Owners:
        ada, mallory = (client_with_key(server, new_key(server, owner)["key"]) for owner in ("lovelace", "mallory"))
        return cls(server, client_with_key(server, OPERATOR_KEY), ada, mallory)

    def close(self) -> None:
        for client in (self.operator, self.ada, self.mallory):
            client.delete("/api/sessions?purge=true")
            client.close()


ID = "hers"
TAR = {"Content-Type": "application/x-tar"}

BODIES: dict[str, Any] = {
    "PATCH /api/sessions/{session_id}": {"metadata": {"by": "whom"}},
    "POST /api/sessions/{session_id}/run": {"code": "print(1)"},
    "POST /api/sessions/{session_id}/stream": {"code": "print(1)"},
    "PUT /api/sessions/{session_id}/code": {"code": "print(2)"},
    "POST /api/sessions/{session_id}/rollback": {"version": 1},
    "POST /api/sessions/{session_id}/move": {"from": "f", "to": "g"},
    "POST /api/sessions/{session_id}/mkdir": {"path": "made"},
    "POST /api/sessions/{session_id}/links": {"path": "f"},
    "POST /api/sessions/{session_id}/processes": {"command": "true"},
    "POST /api/sessions/{session_id}/processes/{process}/signal": {"signal": "CONT"},
    "PATCH /api/sessions/{session_id}/processes/{process}": {"pty": {"cols": 80, "rows": 24}},
    "PUT /api/sessions/{session_id}/versions/{number}/name": {"name": "named"},
    "PUT /api/sessions/{session_id}/inbox": {"verify": None, "retries": 0},
}

QUERIES = {"GET /api/sessions/{session_id}/host": {"port": 80}}
# Routes that must be called after all others, in this order.
LAST = ["DELETE /api/sessions/{session_id}", "POST /api/sessions/{session_id}/restore"]


ENDS = ["DELETE /api/sessions/{session_id}/processes/{process}", "POST /api/sessions/{session_id}/stop"]
# Those after which no process runs.


def is_live(route: str) -> bool:
    """Whether it is about processes, contexts or what they do to files, which others must not come upon."""
    return any(part in route for part in ("/processes", "/contexts", "/watch")) or route in ENDS


def routes(client: httpx.Client) -> list[str]:
    """Routes that name a session: those that read, that write, that remove, those of processes, and LAST."""
    described = client.get("/openapi.json").json()["paths"]
    named = [f"{method.upper()} {path}" for path in described for method in described[path] if "{session_id}" in path]
    order = ["GET", "POST", "PUT", "PATCH", "DELETE"]
    named.sort(
        key=lambda route: (
            route in LAST and LAST.index(route) + 1,
            is_live(route),
            route in ENDS and ENDS.index(route) + 1,
            order.index(route.split()[0]),
            route,
        )
    )
    return named


def make_full_session(ada: httpx.Client) -> dict[str, str]:
    """Make a session with a setup, code, a file, a run and a delivery; returns values for the parameters of paths."""
    setup = {"envs": {"A": "1"}}
    assert ada.post("/api/sessions", json={"language": "python", "session_id": ID, "setup": setup}).status_code == 201
    assert eventually(lambda: ada.get(f"/api/sessions/{ID}").json()["setup_status"] == "completed")
    code = {"code": f"open('f', 'w').write('{SECRET}'); print('{SECRET}')"}
    assert ada.put(f"/api/sessions/{ID}/code", json=code).is_success
    ran = ada.post(f"/api/sessions/{ID}/run", json={})
    assert ran.json()["status"] == "ok", ran.text
    assert ada.post(f"/api/sessions/{ID}/run", json={"code": "1", "context": "kept"}).json()["status"] == "ok"
    assert ada.post(f"/api/sessions/{ID}/stop").is_success
    assert ada.put(f"/api/sessions/{ID}/inbox", json={"verify": None, "retries": 0}).is_success
    delivered = ada.post(f"/proxy/{ID}/inbox/x", content=b"{}").json()["delivery_id"]
    settled = f"/api/sessions/{ID}/inbox/deliveries/{delivered}"
    assert eventually(lambda: ada.get(settled).json()["status"] == "done")
    return {"session_id": ID, "path": "f", "number": "2", "run_id": ran.json()["run_id"], "stream": "stdout",
            "delivery_id": delivered, "process": "held", "name": "kept"}  # fmt: skip


def request_route(client: httpx.Client, route: str, values: dict[str, str]) -> httpx.Response:
    """Send a request that this route accepts."""
    method, path = route.split(" ")
    more: dict[str, Any] = {"params": QUERIES.get(route)}
    if route in BODIES:
        more["json"] = BODIES[route]
    elif route.endswith("/archive") and method == "PUT":
        more |= {"content": b"\0" * 1024, "headers": TAR}
    url = re.sub(r"{(\w+)}", lambda match: values[match[1]], path)
    if route.endswith(("/processes/{process}/events", "/watch")):  # which end with the process, or never
        with client.stream(method, url) as answer:
            if not answer.is_success:
                answer.read()
            return answer
    return client.request(method, url, **more)


def call_every_route(client: httpx.Client, values: dict[str, str], ada: httpx.Client) -> dict[str, httpx.Response]:
    """Call every route about ada's session as `client`; returns the answers by route."""
    answers: dict[str, httpx.Response] = {}
    for route in routes(client):
        if is_live(route) and not any(map(is_live, answers)):
            held = {"command": ["cat"], "pty": {"cols": 80, "rows": 24}, "tag": "held"}
            assert ada.post(f"/api/sessions/{ID}/processes", json=held).status_code == 201
            if any(answer.is_success for answer in answers.values()):  # else nothing of the session may change
                assert ada.post(f"/api/sessions/{ID}/run", json={"code": "1", "context": "kept"}).is_success
        if route == LAST[-1]:
            ada.delete(f"/api/sessions/{ID}")  # only a session that is gone can be restored
        answers[route] = request_route(client, route, values)
    return answers


def error_without_id(answer: httpx.Response, session_id: str) -> dict[str, Any]:
    """The body of an error, without what differs between two requests about two sessions."""
    body: dict[str, Any] = json.loads(answer.text.replace(session_id, "ID"))
    return body | {"request_id": ""}


def service_after_attack(owners: Owners) -> str:
    """Let mallory ask for the turn of ada's session while its service runs; returns the status of the service's run."""
    ada = owners.ada
    service = "python3 -m http.server $PORT"
    assert ada.post("/api/sessions", json={"language": "python", "session_id": "busy", "service": service}).is_success
    assert ada.get("/proxy/busy/8000/").status_code == 200
    [run] = ada.get("/api/sessions/busy/runs").json()["runs"]
    for method, path, body in (
        ("POST", "run", {"code": "1"}),
        ("PATCH", "", {"data": {}}),
        ("POST", "rollback", {"version": 1}),
        ("DELETE", "files/f", None),
    ):
        owners.mallory.request(method, f"/api/sessions/busy/{path}".rstrip("/"), json=body)
    status: str = ada.get(f"/api/sessions/busy/runs/{run['run_id']}").json()["status"]
    ada.delete("/api/sessions?purge=true")
    return status


LIST_STORAGE = """
from era_storage import kv, d1, r2
print(kv.get('app', 'k'), [one['name'] for one in kv.list('app')])
print(r2.get('app', 'o'), [one['key'] for one in r2.list('app')])
print(d1.query('app', 'SELECT name FROM sqlite_schema'))
"""

NOTHING = "None []\nNone []\n[]\n"
EVERYTHING = f"{SECRET} ['k']\nb'secret' ['o']\n[{{'name': 't'}}]\n"


def stdout_of(client: httpx.Client, code: str) -> str:
    """What a Python program prints that this client executes."""
    outcome = client.post("/api/execute", json={"language": "python", "code": code}).json()
    assert outcome["status"] == "ok", outcome
    text: str = outcome["stdout"]
    return text


def fill_storage(client: httpx.Client) -> None:
    assert client.put("/api/storage/kv/app/k", json={"value": SECRET}).is_success
    assert client.put("/api/storage/r2/app/o", json={"content": "c2VjcmV0"}).is_success
    sql = f"CREATE TABLE t AS SELECT '{SECRET}' AS s"
    assert client.post("/api/storage/d1/app/exec", json={"sql": sql}).is_success


def headers_seen_with_keys(owners: Owners) -> list[str]:
    """What a public session sees of four calls: three bring keys of the API, the last a key of the session's own."""
    ada, texts = owners.ada, []
    code = "import os, json; print(json.dumps({'body': os.environ['ERA_HTTP_HEADERS']}))"
    assert ada.post("/api/sessions", json={"language": "python", "session_id": "public"}).is_success
    assert ada.put("/api/sessions/public/code", json={"code": code}).is_success
    key = owners.mallory.headers["Authorization"].removeprefix("Bearer ")
    basic = base64.b64encode(f"user:{key}".encode()).decode()
    for value in (f"Bearer {key}", f"Basic {basic}", f"Bearer {OPERATOR_KEY}", "Bearer the-session's-own"):
        with owners.server.client(headers={"Authorization": value}) as client:
            texts.append(client.get("/proxy/public/80/").text)
    ada.delete("/api/sessions?purge=true")
    return texts
