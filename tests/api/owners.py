"""Two owners on one server, and what one of them tries with the sessions and storage of the other."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import IO, Any

import httpx

from tests.conftest import Server, eventually

OPERATORS = "the operator's own key"


SECRET = "canary-7c1d90"


@dataclass
class WeakServer(Server):
    weakness: str = ""
    """Python that takes something out of it."""

    def _spawn(self, command: list[str], environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        if self.weakness:
            code = f"import sys; sys.argv[0] = 'era'; {self.weakness}; from era.client.cli import main; main()"
            command = [sys.executable, "-c", code, "serve"]
        return super()._spawn(command, environment, log)


def keyed(server: Server, key: str) -> httpx.Client:
    return server.client(headers={"Authorization": f"Bearer {key}"})


def new_key(server: Server, owner: str) -> dict[str, Any]:
    with keyed(server, OPERATORS) as operator:
        answer = operator.post("/api/keys", json={"owner": owner})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


@dataclass
class Owners:
    """Clients of two owners' on one server, beside its operator."""

    server: Server
    operator: httpx.Client
    ada: httpx.Client
    mallory: httpx.Client

    @classmethod
    def of(cls, server: Server) -> Owners:
        ada, mallory = (keyed(server, new_key(server, owner)["key"]) for owner in ("lovelace", "mallory"))
        return cls(server, keyed(server, OPERATORS), ada, mallory)

    def close(self) -> None:
        for client in (self.operator, self.ada, self.mallory):
            client.delete("/api/sessions?purge=true")
            client.close()


ID = "hers"


TAR = {"Content-Type": "application/x-tar"}


JSON: dict[str, Any] = {
    "PATCH /api/sessions/{session_id}": {"metadata": {"by": "whom"}},
    "POST /api/sessions/{session_id}/run": {"code": "print(1)"},
    "POST /api/sessions/{session_id}/stream": {"code": "print(1)"},
    "PUT /api/sessions/{session_id}/code": {"code": "print(2)"},
    "POST /api/sessions/{session_id}/rollback": {"version": 1},
    "PUT /api/sessions/{session_id}/inbox": {"verify": None, "retries": 0},
}


QUERIES = {"GET /api/sessions/{session_id}/host": {"port": 80}}


LAST = ["DELETE /api/sessions/{session_id}", "POST /api/sessions/{session_id}/restore"]


def routes(client: httpx.Client) -> list[str]:
    """All that name a session: those that read, those that write, those that remove, and LAST."""
    described = client.get("/openapi.json").json()["paths"]
    found = [f"{method.upper()} {path}" for path in described for method in described[path] if "{session_id}" in path]
    order = ["GET", "POST", "PUT", "PATCH", "DELETE"]
    found.sort(key=lambda route: (route in LAST and LAST.index(route) + 1, order.index(route.split()[0]), route))
    return found


def furnish(ada: httpx.Client) -> dict[str, str]:
    """A session that has everything: what stands for the parameters of paths."""
    setup = {"envs": {"A": "1"}}
    assert ada.post("/api/sessions", json={"language": "python", "session_id": ID, "setup": setup}).status_code == 201
    assert eventually(lambda: ada.get(f"/api/sessions/{ID}").json()["setup_status"] == "completed")
    code = {"code": f"open('f', 'w').write('{SECRET}'); print('{SECRET}')"}
    assert ada.put(f"/api/sessions/{ID}/code", json=code).is_success
    ran = ada.post(f"/api/sessions/{ID}/run", json={})
    assert ran.json()["status"] == "ok", ran.text
    assert ada.put(f"/api/sessions/{ID}/inbox", json={"verify": None, "retries": 0}).is_success
    delivered = ada.post(f"/proxy/{ID}/inbox/x", content=b"{}").json()["delivery_id"]
    settled = f"/api/sessions/{ID}/inbox/deliveries/{delivered}"
    assert eventually(lambda: ada.get(settled).json()["status"] == "done")
    return {"session_id": ID, "path": "f", "number": "2", "run_id": ran.json()["run_id"], "stream": "stdout",
            "delivery_id": delivered}  # fmt: skip


def call(client: httpx.Client, route: str, values: dict[str, str]) -> httpx.Response:
    """A request that this route takes."""
    method, path = route.split(" ")
    more: dict[str, Any] = {"params": QUERIES.get(route)}
    if route in JSON:
        more["json"] = JSON[route]
    elif route.endswith("/archive") and method == "PUT":
        more |= {"content": b"\0" * 1024, "headers": TAR}
    return client.request(method, re.sub(r"{(\w+)}", lambda found: values[found[1]], path), **more)


def everything(client: httpx.Client, values: dict[str, str], ada: httpx.Client) -> dict[str, httpx.Response]:
    answers = {}
    for route in routes(client):
        if route == LAST[-1]:
            ada.delete(f"/api/sessions/{ID}")  # only a session that is gone can be restored
        answers[route] = call(client, route, values)
    return answers


def said(answer: httpx.Response, session_id: str) -> dict[str, Any]:
    """An error, without what is of this one request only."""
    body: dict[str, Any] = json.loads(answer.text.replace(session_id, "ID"))
    return body | {"request_id": ""}


def service_after_attack(owners: Owners) -> str:
    """The status of a service that waits for calls, once somebody else has asked for its session's turn."""
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
        owners.mallory.request(method, f"/api/sessions/busy/{path}".rstrip("/"), json=body, timeout=5)
    status: str = ada.get(f"/api/sessions/busy/runs/{run['run_id']}").json()["status"]
    ada.delete("/api/sessions?purge=true")
    return status


LOOK = """
from era_storage import kv, d1, r2
print(kv.get('app', 'k'), [one['name'] for one in kv.list('app')])
print(r2.get('app', 'o'), [one['key'] for one in r2.list('app')])
print(d1.query('app', 'SELECT name FROM sqlite_schema'))
"""


NOTHING = "None []\nNone []\n[]\n"


ALL = f"{SECRET} ['k']\nb'secret' ['o']\n[{{'name': 't'}}]\n"


def printed(client: httpx.Client, code: str) -> str:
    told = client.post("/api/execute", json={"language": "python", "code": code}).json()
    assert told["status"] == "ok", told
    text: str = told["stdout"]
    return text


def fill_storage(client: httpx.Client) -> None:
    assert client.put("/api/storage/kv/app/k", json={"value": SECRET}).is_success
    assert client.put("/api/storage/r2/app/o", json={"content": "c2VjcmV0"}).is_success
    sql = f"CREATE TABLE t AS SELECT '{SECRET}' AS s"
    assert client.post("/api/storage/d1/app/exec", json={"sql": sql}).is_success


def told_with_keys(owners: Owners) -> list[str]:
    """What a public session has been told of calls that bring keys of the API's."""
    ada, told = owners.ada, []
    seen = "import os, json; print(json.dumps({'body': os.environ['ERA_HTTP_HEADERS']}))"
    assert ada.post("/api/sessions", json={"language": "python", "session_id": "public"}).is_success
    assert ada.put("/api/sessions/public/code", json={"code": seen}).is_success
    key = owners.mallory.headers["Authorization"].removeprefix("Bearer ")
    basic = base64.b64encode(f"user:{key}".encode()).decode()
    for value in (f"Bearer {key}", f"Basic {basic}", f"Bearer {OPERATORS}", "Bearer the-session's-own"):
        with owners.server.client(headers={"Authorization": value}) as client:
            told.append(client.get("/proxy/public/80/").text)
    ada.delete("/api/sessions?purge=true")
    return told
