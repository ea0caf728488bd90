"""Records of runs and what they wrote, over HTTP."""

from __future__ import annotations

import signal
import threading

import httpx

from era.wire.runs import RunRecordsAnswer
from tests.api.answers import assert_recent, checked, refused, run_record
from tests.conftest import MakeServer, MakeSession, Run, eventually
from tests.table import table


def test_a_run_leaves_a_record(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    outcome = run(
        where,
        "import sys; open('f', 'w'); print('out'); print('error', file=sys.stderr); sys.exit(3)",
        env={"KEY": "s3cret"},
    )
    body = run_record(client, where, outcome["run_id"])
    assert body["session_id"] == where
    assert (body["status"], body["exit_code"], body["duration"]) == ("failed", 3, outcome["duration"])
    assert (body["stdout_bytes"], body["stderr_bytes"]) == (4, 6)
    assert (body["stdout_truncated"], body["stderr_truncated"]) == (False, False)
    assert body["state"] == outcome["state"] == {"version": 2, "committed": True, "reason": None}
    assert_recent(body["started_at"])
    assert body["started_at"] <= body["ended_at"]
    assert body["cpu_seconds"] is None or 0 <= body["cpu_seconds"] < 10
    assert body["reaped"] == 0
    assert body["enforced"]["network"] == "full"
    assert "s3cret" not in str(body)

    broken = run(where, "open('.session_data.json', 'w').write('[')")
    body = run_record(client, where, broken["run_id"])
    assert body["state"] == broken["state"]
    assert (body["state"]["committed"], body["state"]["version"]) == (False, 2)
    late = run(where, "while True: pass", timeout=0.2)
    assert run_record(client, where, late["run_id"])["status"] == "timeout"


def test_records_come_newest_first_in_pages(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where, other = session(), session()
    ids = [run(where, "")["run_id"] for _ in range(5)]
    elsewhere = run(other, "")["run_id"]
    body = checked(client.get(f"/api/sessions/{where}/runs"), RunRecordsAnswer, {"runs", "count", "next_cursor"})
    assert [each["run_id"] for each in body["runs"]] == ids[::-1]
    assert (body["count"], body["next_cursor"]) == (5, None)
    first = client.get(f"/api/sessions/{where}/runs?limit=4").json()
    rest = client.get(f"/api/sessions/{where}/runs?limit=4&cursor={first['next_cursor']}").json()
    assert [each["run_id"] for each in first["runs"] + rest["runs"]] == ids[::-1]
    assert rest["next_cursor"] is None
    for bad in ("limit=0", "limit=1001", "cursor=x"):
        refused(client.get(f"/api/sessions/{where}/runs?{bad}"), 400)
    for run_id in (elsewhere, "run_x", "%00"):
        assert refused(client.get(f"/api/sessions/{where}/runs/{run_id}"), 404)["code"] == "no_such_run"
        refused(client.get(f"/api/sessions/{where}/runs/{run_id}/stdout"), 404)
    refused(client.get(f"/api/sessions/{where}/runs/{ids[0]}/stdin"), 400)
    refused(client.get("/api/sessions/nobody/runs"), 404, "nobody")
    refused(client.get(f"/api/sessions/nobody/runs/{ids[0]}"), 404, "nobody")


@table("size", [0, 1, 16 << 10, (16 << 10) + 1, 300_000])
def test_the_whole_output_is_kept(size: int, client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    outcome = run(where, f"import os, sys; os.write(2, b'e' * {size // 2}); sys.stdout.write('ü' + 'x' * {size})")
    url = f"/api/sessions/{where}/runs/{outcome['run_id']}"
    answer = client.get(f"{url}/stdout")
    assert answer.status_code == 200
    assert answer.content == "ü".encode() + b"x" * size
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.get(f"{url}/stderr").content == b"e" * (size // 2)
    part = client.get(f"{url}/stdout", headers={"Range": f"bytes=1-{size}"})
    assert (part.status_code, part.content) == ((206, answer.content[1 : size + 1]) if size else (200, answer.content))


RANGES = {
    "bytes=0-0": (206, b"0", "bytes 0-0/10"),
    "bytes=3-5": (206, b"345", "bytes 3-5/10"),
    "bytes=8-": (206, b"89", "bytes 8-9/10"),
    "bytes=8-99": (206, b"89", "bytes 8-9/10"),
    "bytes=-3": (206, b"789", "bytes 7-9/10"),
    "bytes=-99": (206, b"0123456789", "bytes 0-9/10"),
    "bytes=10-": (416, None, "bytes */10"),
    "bytes=-0": (416, None, "bytes */10"),
    "bytes=99-100": (416, None, "bytes */10"),
    "bytes=5-3": (200, b"0123456789", None),
    "bytes=-": (200, b"0123456789", None),
    "bytes=a-b": (200, b"0123456789", None),
    "bytes=0-1,3-4": (200, b"0123456789", None),
    "lines=0-1": (200, b"0123456789", None),
    "bytes=" + "9" * 5000 + "-": (200, b"0123456789", None),
}


def test_ranges_of_an_output(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    url = f"/api/sessions/{where}/runs/{run(where, "print('0123456789', end='')")['run_id']}/stdout"
    for header, (status, content, where_in) in RANGES.items():
        answer = client.get(url, headers={"Range": header})
        assert answer.status_code == status, header
        assert answer.headers.get("content-range") == where_in, header
        if content is None:
            assert refused(answer, 416)["code"] == "range_not_satisfiable"
        else:
            assert answer.content == content, header
    refused(client.get(url.replace("stdout", "stderr"), headers={"Range": "bytes=0-"}), 416)


def test_only_the_newest_outputs_are_kept(own_server: MakeServer) -> None:
    server = own_server(outputs_kept="2")
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        codes = ("print(1)", "print('x' * 30000)", "", "print(4)")
        ids = [client.post("/api/sessions/s/run", json={"code": code}).json()["run_id"] for code in codes]
        answers = [client.get(f"/api/sessions/s/runs/{run_id}/stdout") for run_id in ids]
        assert refused(answers[0], 404, "ERA_OUTPUTS_KEPT")["code"] == "output_gone"
        assert refused(answers[1], 404)["code"] == "output_gone"
        assert [answer.text for answer in answers[2:]] == ["", "4\n"]
        assert client.get(f"/api/sessions/s/runs/{ids[0]}").json()["stdout_bytes"] == 2


def test_records_and_outputs_outlive_a_kill(own_server: MakeServer) -> None:
    server = own_server()
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        outcome = client.post("/api/sessions/s/run", json={"code": "print('x' * 30000)"}).json()
        before = client.get("/api/sessions/s/runs").json()
        thread = threading.Thread(target=_run_until_hangup, args=(server.url,))
        thread.start()
        assert eventually(lambda: len(client.get("/api/sessions/s/runs").json()["runs"]) == 2)
    server.stop(signal.SIGKILL)
    thread.join()
    server.start()
    with server.client() as client:
        lost, kept = client.get("/api/sessions/s/runs").json()["runs"]
        assert [kept] == before["runs"]
        assert client.get(f"/api/sessions/s/runs/{outcome['run_id']}/stdout").text == outcome["stdout"]
        assert (lost["status"], lost["exit_code"]) == ("lost", None)
        assert lost["ended_at"]
        assert client.get(f"/api/sessions/s/runs/{lost['run_id']}").json()["code"] == UNTIL_HANGUP
        assert lost["state"]["reason"]
        refused(client.get(f"/api/sessions/s/runs/{lost['run_id']}/stdout"), 404, "lost")


UNTIL_HANGUP = "import time; time.sleep(60)"


def _run_until_hangup(url: str) -> None:
    try:
        httpx.post(f"{url}/api/sessions/s/run", json={"code": UNTIL_HANGUP}, timeout=60)
    except httpx.TransportError:
        return
