"""Keys of limited use: scopes, an end, another secret. A key without a scope gets past no route that needs it."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from tests.api.live import refusal, start
from tests.api.owners import OPERATOR_KEY, Owners, client_with_key
from tests.conftest import Server, eventually
from tests.table import table

SESSION = "scoped"


def make_key(owners: Owners, **fields: Any) -> dict[str, Any]:
    answer = owners.operator.post("/api/keys", json={"owner": "scoped", **fields})
    assert answer.status_code == 201, answer.text
    body: dict[str, Any] = answer.json()
    return body


def later(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def every_call(client: httpx.Client) -> list[tuple[str, str]]:
    """Method and path of every call there is, about one session."""
    values = {"session_id": SESSION, "owner": "scoped", "path": "f", "namespace": "n", "key": "k", "number": "1"}
    calls = []
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        if not path.startswith("/api/"):
            continue
        for name in path.split("{")[1:]:
            name = name.partition("}")[0]
            path = path.replace("{" + name + "}", values.get(name, "x"))
        calls += [(method.upper(), path) for method in methods]
    return calls


def refusals(client: httpx.Client, calls: list[tuple[str, str]]) -> set[str]:
    """Those of the calls that are refused for want of a scope."""
    refused = set()
    for method, path in calls:
        answer = client.request(method, path, json={"code": "1"} if method in ("POST", "PUT", "PATCH") else None)
        if answer.status_code == 403 and answer.json()["code"] in ("scope_missing", "not_operator"):
            refused.add(f"{method} {path}")
    return refused


def test_a_key_that_only_reads_changes_nothing(owners: Owners) -> None:
    with (
        client_with_key(owners.server, make_key(owners)["key"]) as full,
        client_with_key(owners.server, make_key(owners, scopes=["read"])["key"]) as reader,
        client_with_key(owners.server, make_key(owners, scopes=["run"])["key"]) as runner,
    ):
        body = {"language": "python", "session_id": SESSION, "data": {"n": 1}}
        assert full.post("/api/sessions", json=body).status_code == 201
        assert full.put(f"/api/sessions/{SESSION}/files/f", content=b"1").is_success
        before = full.get(f"/api/sessions/{SESSION}?include=files").json()

        calls = [(method, path) for method, path in every_call(full) if method != "GET"]
        assert len(calls) > 40
        assert refusals(reader, calls) == {f"{method} {path}" for method, path in calls}
        assert reader.get(f"/api/sessions/{SESSION}?include=files").json() == before
        denied = reader.post(f"/api/sessions/{SESSION}/run", json={"code": "1"}).json()
        assert "'run'" in denied["error"]
        assert "'read'" in denied["error"]
        # The same by any other way to write a path, and by the tools of models.
        for path in (
            f"/api/sessions/{SESSION}/run/",
            f"/api//sessions/{SESSION}/run",
            f"/api/sessions/{SESSION}/%72un",
        ):
            answer = reader.post(path, json={"code": "open('g', 'w')"})
            assert answer.status_code in (403, 404), path
        tool = {"name": "era_run_in_session", "arguments": {"session_id": SESSION, "code": "open('g', 'w')"}}
        called = reader.post(
            "/mcp/v1",
            json={"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": tool},
            headers={"Accept": "application/json, text/event-stream"},
        )
        assert "needs a key with the scope 'run'" in called.text
        assert full.get(f"/api/sessions/{SESSION}?include=files").json()["version"] == before["version"]

        others = [
            ("GET", f"/api/sessions/{SESSION}"),
            ("DELETE", f"/api/sessions/{SESSION}"),
            ("PUT", f"/api/sessions/{SESSION}/files/f"),
            ("POST", "/api/sessions"),
            ("POST", "/api/storage/d1/n/query"),
        ]
        assert refusals(runner, others) == {f"{method} {path}" for method, path in others}
        assert runner.post(f"/api/sessions/{SESSION}/run", json={"code": "print(2)"}).json()["stdout"] == "2\n"
        assert runner.get("/api/keys").json()["code"] == "not_operator"
        full.delete("/api/sessions?purge=true")


def test_only_a_key_that_runs_code_gets_a_websocket(owners: Owners) -> None:
    """It comes as a GET, and gives programs input."""
    made = {scope: make_key(owners, scopes=[scope]) for scope in ("run", "read", "write")}
    with client_with_key(owners.server, make_key(owners)["key"]) as full, ExitStack() as stack:
        where = full.post("/api/sessions", json={"language": "python"}).json()["session_id"]
        stack.callback(full.delete, f"/api/sessions/{where}?purge=true")
        process = start(full, where, "cat > got.txt")
        paths = [f"{where}/terminal", f"{where}/terminal/", f"{where}/processes/{process}/attach"]
        for path in [*paths, f"{where}/%74erminal"]:
            for scope in ("read", "write"):
                bearer = f"Authorization: Bearer {made[scope]['key']}"
                assert refusal(owners.server, path, bearer) == (403, "scope_missing"), (path, scope)
        assert [one["process_id"] for one in full.get(f"/api/sessions/{where}/processes").json()["processes"]] == [
            process
        ]
        bearer = f"Authorization: Bearer {made['run']['key']}"
        for path in (paths[0], paths[2]):
            assert refusal(owners.server, path, bearer) == (101, "")


def test_a_line_s_end_behind_a_path_changes_nothing(owners: Owners) -> None:
    """To patterns of routes it is the path's end, so a call of code would be one of something unknown."""
    with client_with_key(owners.server, make_key(owners, scopes=["read", "write"])["key"]) as writer:
        where = writer.post("/api/sessions", json={"language": "python"}).json()["session_id"]
        for path, body in (
            ("/api/execute", {"language": "python", "code": "print(1)"}),
            (f"/api/sessions/{where}/run", {"code": "print(1)"}),
            (f"/api/sessions/{where}/processes", {"command": "echo 1"}),
        ):
            assert writer.post(path, json=body).json()["code"] == "scope_missing", path
            assert writer.post(path + "%0A", json=body).status_code == 404, path
        assert refusal(owners.server, f"{where}/terminal%0A", f"Authorization: {writer.headers['authorization']}") == (
            404,
            "not_found",
        )
        assert writer.put(f"/api/sessions/{where}/files/odd%0A", content=b"1").is_success  # here it is a name's
        assert writer.get(f"/api/sessions/{where}/files/odd%0A").content == b"1"
        writer.delete(f"/api/sessions/{where}?purge=true")


WEAKNESS = "import era.api.routing.scopes; era.api.routing.scopes.check = lambda *_, **__: None"


def test_without_the_check_the_attack_succeeds(tmp_path: Path) -> None:
    """What the test above tries is refused by the check of scopes, and by nothing else."""
    server = Server(tmp_path / "weak", {"ERA_API_KEY": OPERATOR_KEY}, weakness=WEAKNESS).start()
    try:
        weak = Owners.of(server)
        with client_with_key(server, make_key(weak, scopes=["read"])["key"]) as reader:
            body = {"language": "python", "session_id": SESSION}
            assert reader.post("/api/sessions", json=body).status_code == 201
            assert reader.post(f"/api/sessions/{SESSION}/run", json={"code": "print(3)"}).json()["stdout"] == "3\n"
            assert reader.delete(f"/api/sessions/{SESSION}").is_success
            assert reader.post("/api/keys", json={"owner": "mallory"}).status_code == 201
        weak.close()
    finally:
        server.stop()


def test_a_key_with_the_scope_admin_is_as_good_as_the_operators(owners: Owners) -> None:
    with client_with_key(owners.server, make_key(owners, scopes=["admin"])["key"]) as admin:
        made = admin.post("/api/keys", json={"owner": "scoped", "scopes": ["read"]})
        assert made.status_code == 201
        assert admin.get("/api/sessions").json()["code"] == "scope_missing"
        changed = admin.patch(f"/api/keys/{made.json()['id']}", json={"scopes": ["run"], "description": "new"})
        assert (changed.json()["scopes"], changed.json()["description"]) == (["run"], "new")
        with client_with_key(owners.server, made.json()["key"]) as other:
            assert other.get("/api/sessions").json()["code"] == "scope_missing"


def test_a_key_that_has_ended_lets_nobody_in(owners: Owners) -> None:
    made = make_key(owners, expires_at=later(3600))
    with client_with_key(owners.server, made["key"]) as client:
        assert client.get("/api/sessions").is_success
        url = f"/api/keys/{made['id']}"
        for wrong in (later(-1), "tomorrow", "2030-01-01", 5, ""):
            refused = owners.operator.patch(url, json={"expires_at": wrong})
            assert refused.status_code == 400, wrong
            assert "expires_at" in refused.json()["error"]
        for seconds in (1, 20):  # on a busy machine the first end may be over before it is set, and is refused
            if owners.operator.patch(url, json={"expires_at": later(seconds)}).is_success:
                break
        assert eventually(lambda: client.get("/api/sessions").status_code == 401)
        assert owners.operator.post(f"{url}/rotate", json={}).json()["code"] == "key_expired"
        assert owners.operator.patch(url, json={"expires_at": None}).json()["expires_at"] is None
        assert client.get("/api/sessions").is_success


def test_another_secret_and_the_one_before(owners: Owners) -> None:
    made = make_key(owners, quotas={"sessions": 5})
    url = f"/api/keys/{made['id']}"

    def status(key: str) -> int:
        with client_with_key(owners.server, key) as client:
            return client.get("/api/sessions").status_code

    second = owners.operator.post(f"{url}/rotate", json={"grace_seconds": 3600}).json()
    assert (second["id"], second["quotas"], second["key"] != made["key"]) == (made["id"], {"sessions": 5}, True)
    assert second["old_secret_until"] > second["created_at"]
    assert (status(made["key"]), status(second["key"])) == (200, 200)
    third = owners.operator.post(f"{url}/rotate").json()
    assert [status(each["key"]) for each in (made, second, third)] == [401, 200, 200]
    fourth = owners.operator.post(f"{url}/rotate", json={"grace_seconds": 0}).json()
    assert fourth["old_secret_until"] is None
    assert [status(each["key"]) for each in (made, second, third, fourth)] == [401, 401, 401, 200]
    for wrong in (-1, 1e9, "x", None):
        assert owners.operator.post(f"{url}/rotate", json={"grace_seconds": wrong}).status_code == 400, wrong
    assert owners.operator.delete(url).is_success
    assert status(fourth["key"]) == 401
    assert owners.operator.post(f"{url}/rotate").status_code == 404
    assert owners.operator.patch(url, json={"description": "x"}).status_code == 404
    assert owners.operator.get(url).status_code == 404


@table("scopes", [[], ["reed"], "read", None, ["read", 1]])
def test_scopes_that_cannot_be(owners: Owners, scopes: Any) -> None:
    refused = owners.operator.post("/api/keys", json={"owner": "scoped", "scopes": scopes})
    assert refused.status_code == 400
    assert "scopes" in refused.json()["error"]


def test_links_are_good_for_what_their_key_is_good_for(owners: Owners) -> None:
    made = make_key(owners)
    with client_with_key(owners.server, made["key"]) as client, owners.server.client() as anybody:
        client.post("/api/sessions", json={"language": "python", "session_id": "linked"})
        assert client.put("/api/sessions/linked/files/f", content=b"1").is_success
        urls = {}
        for method in ("GET", "PUT"):
            answer = client.post("/api/sessions/linked/links", json={"path": "f", "method": method, "expires_in": 600})
            urls[method] = answer.json()["url"].partition("/links/")[2]
        assert anybody.put(f"/links/{urls['PUT']}", content=b"2").is_success
        assert owners.operator.patch(f"/api/keys/{made['id']}", json={"scopes": ["read"]}).is_success
        assert anybody.get(f"/links/{urls['GET']}").content == b"2"
        assert anybody.put(f"/links/{urls['PUT']}", content=b"3").status_code == 404
        assert owners.operator.patch(f"/api/keys/{made['id']}", json={"scopes": ["run", "write"]}).is_success
        assert anybody.get(f"/links/{urls['GET']}").status_code == 404
        client.delete("/api/sessions?purge=true")
