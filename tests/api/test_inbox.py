"""Inboxes on real servers: an acknowledged delivery is run, in order, and retried until it succeeds or is given up."""

from __future__ import annotations

import base64
import hmac
import json
import signal
import sqlite3
import threading
import time
from contextlib import closing
from typing import Any

import httpx

from era.core import signatures
from era.wire.inbox import DeliveryAnswer, DeliveryContentAnswer, InboxAnswer
from tests.conftest import MakeServer, MakeSession, Server, eventually

SECRET = "s3cret-of-the-inbox"
CODE = """\
import json, os, sys, time
path, body, attempt = (os.environ[name] for name in ("ERA_HTTP_PATH", "ERA_HTTP_BODY", "ERA_DELIVERY_ATTEMPT"))
with open("log", "a") as file:
    file.write(f"{body}{attempt} ")
if path == "/once" and attempt == "1":
    print(json.dumps({"status": 503}))
elif path == "/exit":
    sys.exit(3)
elif path == "/slow" and attempt == "1":
    time.sleep(60)
elif path == "/env":
    print(json.dumps({name: value for name, value in os.environ.items() if name.startswith("ERA_")}))
else:
    print("fine")
"""


def make_inbox(client: httpx.Client, where: str, code: str | None = CODE, **fields: Any) -> dict[str, Any]:
    """Give a session an inbox and code; returns the inbox."""
    answer = client.put(f"/api/sessions/{where}/inbox", json=fields)
    assert answer.status_code == 200, answer.text
    if code is not None:
        store(client, where, code)
    body: dict[str, Any] = answer.json()
    return body


def store(client: httpx.Client, where: str, code: str) -> None:
    """Store code in a session."""
    assert client.put(f"/api/sessions/{where}/code", json={"code": code}).status_code == 200


def deliver(client: httpx.Client, where: str, body: Any = b"x", path: str = "", **headers: str) -> httpx.Response:
    """Send a delivery to a session's inbox."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post(f"/proxy/{where}/inbox{path}", content=body, headers=named)


def deliver_accepted(client: httpx.Client, where: str, body: Any = b"x", path: str = "", **headers: str) -> str:
    """Send a delivery that must be accepted; returns its id."""
    answer = deliver(client, where, body, path, **headers)
    assert (answer.status_code, answer.json()["status"]) == (202, "pending"), answer.text
    return str(answer.json()["delivery_id"])


def listed(client: httpx.Client, where: str, **query: Any) -> list[dict[str, Any]]:
    """Deliveries, newest first."""
    deliveries: list[dict[str, Any]] = client.get(f"/api/sessions/{where}/inbox/deliveries", params=query).json()[
        "deliveries"
    ]
    return deliveries


def settle(client: httpx.Client, where: str) -> list[dict[str, Any]]:
    """Wait until all deliveries have ended; returns them, oldest first."""
    assert eventually(lambda: all(one["status"] in ("done", "failed") for one in listed(client, where))), listed(
        client, where
    )
    return listed(client, where)[::-1]


def delivery_of(client: httpx.Client, where: str, delivery: str) -> dict[str, Any]:
    """A delivery with its content and runs."""
    answer = client.get(f"/api/sessions/{where}/inbox/deliveries/{delivery}")
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def log_of(client: httpx.Client, where: str) -> str:
    """What CODE has logged: body and attempt of each delivery."""
    return client.get(f"/api/sessions/{where}/files/log").text


def replay(client: httpx.Client, where: str, delivery: str) -> httpx.Response:
    return client.post(f"/api/sessions/{where}/inbox/deliveries/{delivery}/replay")


def test_deliveries_are_run_in_order(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    inbox = make_inbox(client, where)
    assert inbox["url"] == f"{client.base_url}/proxy/{where}/inbox".replace("//proxy", "/proxy")
    ids = [deliver_accepted(client, where, f"{n}:".encode()) for n in range(10)]
    ended = settle(client, where)
    assert set(inbox) == set(InboxAnswer.model_fields)
    assert [set(each) for each in ended] == [set(DeliveryAnswer.model_fields)] * 10
    assert set(delivery_of(client, where, ids[0])) == set(DeliveryContentAnswer.model_fields)
    assert [each["id"] for each in ended] == ids
    assert [(each["status"], each["attempts"], each["answer_status"]) for each in ended] == [("done", 1, 200)] * 10
    assert log_of(client, where) == "".join(f"{n}:1 " for n in range(10))
    runs = client.get(f"/api/sessions/{where}/runs").json()["runs"]
    assert [[run["run_id"]] for run in runs[::-1]] == [each["run_ids"] for each in ended]
    assert client.get(f"/api/sessions/{where}/inbox").json()["deliveries"] == {
        "pending": 0, "running": 0, "done": 10, "failed": 0,
    }  # fmt: skip
    page = client.get(f"/api/sessions/{where}/inbox/deliveries?limit=4&status=done").json()
    rest = client.get(f"/api/sessions/{where}/inbox/deliveries?cursor={page['next_cursor']}").json()
    assert [each["id"] for each in page["deliveries"] + rest["deliveries"]] == ids[::-1]
    assert listed(client, where, status="failed") == []


def test_the_program_sees_what_the_relay_would_show(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    make_inbox(client, where)
    body = b'{"\xff'
    answer = client.post(
        f"/proxy/{where}/inbox/env/%2fa?b=%20c",
        content=body,
        headers=[("X-A", "1"), ("X-A", "2"), ("Cookie", "other=1; era-session-own=2")],
    )
    delivery = answer.json()["delivery_id"]
    store(client, where, CODE.replace('"/env"', '"/env/%2fa"'))
    settle(client, where)
    replay(client, where, delivery)
    settle(client, where)
    stored = delivery_of(client, where, delivery)
    env = client.get(f"/api/sessions/{where}/runs/{stored['run_ids'][-1]}/stdout").json()
    assert (env["ERA_REQUEST_MODE"], env["ERA_HTTP_METHOD"]) == ("proxy", "POST")
    assert (env["ERA_HTTP_PATH"], env["ERA_HTTP_QUERY"]) == ("/env/%2fa", "?b=%20c")
    assert base64.b64decode(env["ERA_HTTP_BODY"]) == base64.b64decode(stored["body"]) == body
    assert env["ERA_HTTP_BODY_ENCODING"] == stored["body_encoding"] == "base64"
    headers = json.loads(env["ERA_HTTP_HEADERS"])
    assert (headers["x-a"], headers["cookie"]) == ("1, 2", "own=2")
    assert ["x-a", "1"] in stored["headers"]
    assert ["cookie", "own=2"] in stored["headers"]
    assert (env["ERA_DELIVERY_ID"], env["ERA_DELIVERY_ATTEMPT"]) == (delivery, "2")
    assert (stored["method"], stored["path"], stored["query"]) == ("POST", "/env/%2fa", "b=%20c")


def test_a_delivery_sent_twice_is_run_once(client: httpx.Client, session: MakeSession, server: Server) -> None:
    where, name = session(), "X-GitHub-Delivery"
    make_inbox(client, where)
    answers: list[httpx.Response] = []

    def send() -> None:
        with server.client() as other:
            answers.append(deliver(other, where, b"a", **{name: "id-1"}))

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [202]
    assert len({answer.json()["delivery_id"] for answer in answers}) == 1
    [ended] = settle(client, where)
    assert (ended["sender_id"], ended["attempts"]) == ("id-1", 1)
    again = deliver(client, where, b"a", **{name: "id-1"})
    assert (again.status_code, again.json()) == (200, {"delivery_id": ended["id"], "status": "done"})
    for other in ("Idempotency-Key", "X-Delivery-Id"):
        deliver_accepted(client, where, b"b", **{other: other})
        assert deliver(client, where, b"b", **{other: other}).status_code == 200
    settle(client, where)
    assert log_of(client, where) == "a1 b1 b1 "


def test_a_delivery_that_was_given_up_can_be_replayed_with_other_code(
    client: httpx.Client, session: MakeSession
) -> None:
    where = session()
    make_inbox(client, where, retries=0)
    lost = deliver_accepted(client, where, b"a", "/exit")
    deliver_accepted(client, where, b"b")
    ended = settle(client, where)
    assert [each["status"] for each in ended] == ["failed", "done"]  # the next delivery isn't held up for ever
    assert ended[0]["reason"] == "The run ended as 'failed'."
    store(client, where, CODE.replace("sys.exit(3)", "print('mended')"))
    answer = replay(client, where, lost)
    assert (answer.status_code, answer.json()["status"]) == (202, "pending")
    ended = settle(client, where)
    assert [(each["status"], each["attempts"]) for each in ended] == [("done", 2), ("done", 1)]
    said = client.get(f"/api/sessions/{where}/runs/{ended[0]['run_ids'][1]}/stdout").text
    assert said == "mended\n"
    assert log_of(client, where) == "a1 b1 a2 "
    assert replay(client, where, "dlv_none").status_code == 404


def test_replaying_a_waiting_delivery_makes_it_due_at_once(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    make_inbox(client, where, CODE.replace('attempt == "1"', 'attempt in "12"'))
    delivery = deliver_accepted(client, where, b"a", "/once")
    assert eventually(lambda: listed(client, where)[0]["attempts"] == 2 and listed(client, where)[0]["next_attempt_at"])
    due = listed(client, where)[0]["next_attempt_at"]
    assert listed(client, where)[0]["reason"] == "The program answered 503."
    assert replay(client, where, delivery).status_code == 202
    assert settle(client, where)[0]["ended_at"] < due
    store(client, where, CODE)
    slow = deliver_accepted(client, where, b"b", "/slow")
    assert eventually(lambda: listed(client, where)[0]["status"] == "running")
    assert replay(client, where, slow).status_code == 409
    stopped = client.delete(f"/api/sessions/{where}/runs/{listed(client, where)[0]['run_ids'][0]}")
    assert stopped.json()["status"] == "killed"
    assert settle(client, where)[-1]["attempts"] == 2


def test_deliveries_wait_for_code_to_be_stored(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    make_inbox(client, where, None, retries=0)
    deliver_accepted(client, where, b"a")
    deliver_accepted(client, where, b"b")
    assert eventually(lambda: listed(client, where)[-1]["reason"] == "The session stores no code.")
    # A session that was deleted and restored still has its deliveries; nothing is run meanwhile.
    assert client.delete(f"/api/sessions/{where}").status_code == 200
    assert deliver(client, where).status_code == 404
    assert client.post(f"/api/sessions/{where}/restore").status_code == 200
    assert [one["status"] for one in listed(client, where)] == ["pending", "pending"]
    store(client, where, CODE)
    assert [one["status"] for one in settle(client, where)] == ["done", "done"]
    assert log_of(client, where) == "a1 b1 "


def signed(body: bytes, secret: str = SECRET, at: float | None = None) -> dict[str, str]:
    """The header by which a sender signs `body` in Stripe's form."""
    return {"X-Own": signatures.signed(secret, body, int(time.time() if at is None else at))}


def test_a_wrong_signature_is_refused_and_nothing_stored(client: httpx.Client, session: MakeSession) -> None:
    """The other schemes are in tests/core/test_signatures.py."""
    where = session()
    make_inbox(client, where, verify={"scheme": "stripe", "secret": SECRET, "header": "X-Own"})
    body = b'{"id": "evt_1"}'
    forged = [{}, signed(body, "other"), signed(body + b" "), signed(body, at=time.time() - 400)]
    for headers in forged:
        answer = deliver(client, where, body, **headers)
        assert (answer.status_code, answer.json()["code"]) == (401, "bad_signature")
        assert SECRET not in answer.text
    assert listed(client, where) == []
    deliver_accepted(client, where, body, **signed(body))
    assert deliver(client, where, body, **signed(body)).status_code == 200  # Stripe's events have an id of their own
    settle(client, where)
    make_inbox(client, where)  # without `verify` the same forgeries are accepted, so `verify` was what refused them
    for headers in forged:
        deliver_accepted(client, where, body, **headers)
    settle(client, where)


def test_the_secret_is_in_no_answer_log_or_copy(client: httpx.Client, session: MakeSession, server: Server) -> None:
    where = session()
    verify = {"scheme": "github", "secret": SECRET}
    own = hmac.digest(SECRET.encode(), b"a", "sha256").hex()
    answers = [client.put(f"/api/sessions/{where}/inbox", json={"verify": verify})]
    assert answers[0].json()["verify"] == {"scheme": "github", "header": "x-hub-signature-256"}
    for wrong in ({"scheme": "x"}, {"more": 1}, {"header": "a b"}, {"header": "\n"}):
        answers.append(client.put(f"/api/sessions/{where}/inbox", json={"verify": {**verify, **wrong}}))
        assert answers[-1].status_code == 400
    answers.append(client.put(f"/api/sessions/{where}/inbox", json={"verify": verify, "retries": 21}))
    assert answers[-1].status_code == 400
    store(client, where, CODE)
    delivery = deliver_accepted(client, where, b"a", "/env", X_Hub_Signature_256=f"sha256={own}")
    [ended] = settle(client, where)
    duplicate = client.post(f"/api/sessions/{where}/duplicate", json={"id": f"{where}-2"})
    for path in ("", "/inbox", "/inbox/deliveries", f"/inbox/deliveries/{delivery}", "/capsule", "/runs"):
        answers.append(client.get(f"/api/sessions/{where}{path}"))
        assert answers[-1].status_code == 200
    answers.append(client.get(f"/api/sessions/{where}/runs/{ended['run_ids'][0]}/stdout"))
    capsule = client.get(f"/api/sessions/{where}/capsule").content
    imported = client.post(
        f"/api/sessions/import?id={where}-3", content=capsule, headers={"Content-Type": "application/x-tar"}
    )
    for answer in [*answers, duplicate, imported]:
        assert SECRET.encode() not in answer.content
    assert SECRET not in server.log
    for other in (duplicate, imported):  # copies have no inbox
        assert other.status_code == 201
        gone = client.get(f"/api/sessions/{other.json()['id']}/inbox")
        assert (gone.status_code, gone.json()["code"]) == (404, "no_inbox")


def test_deliveries_that_are_refused(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    answer = deliver(client, where)
    assert (answer.status_code, answer.json()["code"]) == (404, "no_inbox")
    assert client.delete(f"/api/sessions/{where}/inbox").status_code == 404
    make_inbox(client, where)
    for method in ("GET", "PUT", "DELETE"):
        answer = client.request(method, f"/proxy/{where}/inbox/x")
        assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    for body, status in ((b"x" * (128 << 10), 413), (b"\xff" * (97 << 10), 413), (b"x" * 120_000, 202)):
        assert deliver(client, where, body).status_code == status
    assert [one["status"] for one in settle(client, where)] == ["done"]
    assert deliver(client, "none").status_code == 404
    assert client.post(f"/proxy/{where}/inboxes").status_code == 400
    for wrong in ({"retries": -1}, {"retries": "1"}, {"more": 1}, {"verify": {"scheme": "github", "secret": ""}}):
        assert client.put(f"/api/sessions/{where}/inbox", json=wrong).status_code == 400
    assert client.patch(f"/api/sessions/{where}", json={"allowPublicAccess": False}).status_code == 200
    answer = deliver(client, where)
    assert (answer.status_code, answer.json()["code"]) == (403, "not_public")
    assert client.delete(f"/api/sessions/{where}/inbox").json()["deleted_deliveries"] == 1
    assert client.get(f"/api/sessions/{where}/inbox/deliveries").status_code == 404
    make_inbox(client, where)
    assert listed(client, where) == []


def test_nothing_acknowledged_is_lost(own_server: MakeServer) -> None:
    key = "the-key-of-the-api"
    server = own_server(api_key=key, drain_seconds="0")
    bearer = {"Authorization": f"Bearer {key}"}
    for how, retries in ((signal.SIGKILL, 1), (signal.SIGTERM, 0)):  # a run stopped by SIGTERM is no failed attempt
        where = how.name
        with server.client(headers=bearer) as client:
            client.post("/api/sessions", json={"language": "python", "session_id": where})
            make_inbox(client, where, retries=retries)
            deliver_accepted(client, where, b"a", "/slow")
            assert eventually(lambda: listed(client, where)[0]["status"] == "running")  # noqa: B023  called in this turn
            ids = [deliver_accepted(client, where, f"{n}:".encode()) for n in range(5)]
        server.stop(how)
        server.start()
        with server.client(headers=bearer) as client:
            ended = settle(client, where)
            assert [one["id"] for one in ended[1:]] == ids
            assert [(one["status"], one["attempts"]) for one in ended] == [("done", 2), *[("done", 1)] * 5]
            first = client.get(f"/api/sessions/{where}/runs/{ended[0]['run_ids'][0]}").json()
            assert first["status"] != "ok"
            assert (first["status"] == "lost") == (how == signal.SIGKILL)
            assert log_of(client, where).endswith("a2 0:1 1:1 2:1 3:1 4:1 ")
            assert key not in json.dumps(delivery_of(client, where, ids[0]))
    assert server.stop() == 0
    assert "Traceback" not in server.log, server.log


def test_a_full_inbox_refuses_deliveries(client: httpx.Client, session: MakeSession, server: Server) -> None:
    where = session()
    make_inbox(client, where, None)
    deliver_accepted(client, where, b"a", X_Delivery_Id="known")
    with closing(sqlite3.connect(server.content_dir / "era.sqlite", timeout=10)) as database:
        columns = [row[1] for row in database.execute("PRAGMA table_info(deliveries)") if row[1] != "key"]
        new = {"id": "'dlv_' || n", "position": "position + n", "sender_id": "NULL"}
        fill = (
            "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 9999) "
            f"INSERT INTO deliveries ({', '.join(columns)}) "
            f"SELECT {', '.join(new.get(name, name) for name in columns)} FROM deliveries, numbers WHERE session_key = "
            "(SELECT key FROM sessions WHERE id = ? AND deleted_at IS NULL)"
        )
        database.execute(fill, [where])
        database.commit()
    assert client.get(f"/api/sessions/{where}/inbox").json()["deliveries"]["pending"] == 10_000
    answer = deliver(client, where)
    assert (answer.status_code, answer.json()["code"]) == (429, "too_many_deliveries")
    assert int(answer.headers["Retry-After"]) >= 1
    assert deliver(client, where, X_Delivery_Id="known").status_code == 200
    store(client, where, "print('fine')")
    assert eventually(lambda: listed(client, where, status="done"))
    deliver_accepted(client, where)
    assert client.delete(f"/api/sessions/{where}/inbox").json()["deleted_deliveries"] >= 10_000
