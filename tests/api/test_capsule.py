"""Sessions moved as capsules, over HTTP."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.answers import refused
from tests.api.capsule_api import TAR, export_capsule, import_capsule, send_capsule
from tests.api.test_bad_capsules import LOOK, make_furnished_session
from tests.capsules import parts
from tests.conftest import MakeServer, MakeSession, Run, Server
from tests.soaking import soak_the_rest


def described(client: httpx.Client, session_id: str) -> dict[str, Any]:
    """All that the API shows of a session, without what differs between a session and its copy."""
    base = f"/api/sessions/{session_id}"

    def get(path: str) -> Any:
        answer = client.get(f"{base}{path}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    shown = get("?include=files")
    for name in ("id", "session_id", "expires_at"):
        del shown[name]
    versions = [get(f"/versions/{each['version']}?include=files") for each in get("/versions")["versions"]]
    runs = [get(f"/runs/{each['run_id']}") for each in get("/runs")["runs"]]
    outputs = [
        client.get(f"{base}/runs/{each['run_id']}/{stream}").content for each in runs for stream in ("stdout", "stderr")
    ]
    for each in (*versions, *runs):
        each["run_id"] = each["run_id"] and each["run_id"].partition("-")[0]
    for each in runs:
        del each["session_id"]
        each["enforced"].pop("imported", None)
    diffs = [get(f"/versions/{each['version']}/diff") for each in versions]
    return {"session": shown, "versions": versions, "diffs": diffs, "runs": runs, "outputs": outputs}


def run_code(client: httpx.Client, session_id: str, code: str) -> str:
    """Run code; returns what it prints."""
    answer = client.post(f"/api/sessions/{session_id}/run", json={"code": code})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["stdout"])


@pytest.mark.parametrize("elsewhere", soak_the_rest([True, False], 1), ids=["another server", "same server"])
def test_an_imported_session_is_all_that_the_exported_one_was(
    server: Server, client: httpx.Client, own_server: MakeServer, elsewhere: bool
) -> None:
    then, last = make_furnished_session(client, "s")[0], make_furnished_session(client, "t")[1]
    assert then != last
    capsule = export_capsule(client, "s")
    assert b"hush-hush" not in capsule
    before = described(client, "s")
    with (own_server() if elsewhere else server).client() as there:
        new_id = None if elsewhere else "copy"
        name = new_id or "s"
        shown = import_capsule(there, capsule, new_id)
        assert (shown["id"], shown["status"]) == (name, "idle")
        assert described(there, name) == before
        assert all(each["enforced"]["imported"] for each in there.get(f"/api/sessions/{name}/runs").json()["runs"])
        assert there.get("/api/sessions", params={"metadata.team": "blue"}).json()["sessions"][0]["id"] == name
        assert there.get(f"/api/sessions/{name}/code").json()["code"] == "print('störed')"
        if elsewhere:
            assert "era_runs{" not in there.get("/metrics").text

        assert run_code(there, name, LOOK) == run_code(client, "s", LOOK)
        assert there.post(f"/api/sessions/{name}/rollback", json={"version": 2}).status_code == 200
        client.post("/api/sessions/s/rollback", json={"version": 2})
        looked = run_code(there, name, LOOK)
        assert looked == run_code(client, "s", LOOK)
        assert looked == then
        assert there.post(f"/api/sessions/{name}/run", json={}).json()["stdout"] == "störed\n"
        assert there.get(f"/api/sessions/{name}").json()["data"]["n"] == 1
        refused(send_capsule(there, capsule, new_id), 409, name)


def test_a_capsule_of_the_current_version_only(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    run(where, "open('a', 'w').write('first')")
    run(where, "open('a', 'w').write('second')")
    capsule = export_capsule(client, where, versions="current")
    assert b"first" not in capsule
    made = import_capsule(client, capsule, "now")
    assert made["version"] == 3
    assert [each["version"] for each in client.get("/api/sessions/now/versions").json()["versions"]] == [3]
    assert client.get("/api/sessions/now/runs").json()["count"] == 0
    assert run("now", "print(open('a').read())")["stdout"] == "second\n"
    refused(client.get("/api/sessions/now/versions/2"), 404)
    refused(client.get(f"/api/sessions/{where}/capsule?versions=some"), 400, "versions")


def test_a_capsule_can_be_checked_and_repacked_with_tar_and_sha256sum(
    client: httpx.Client, session: MakeSession, tmp_path: Path
) -> None:
    import subprocess

    (tmp_path / "c.tar").write_bytes(export_capsule(client, session(session_id="told")))
    script = "tar xf c.tar && sha256sum -c SHA256SUMS && cat README.txt"
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "capsule.json: OK" in done.stdout
    assert "told" in done.stdout
    again = "tar -cf again.tar capsule.json README.txt SHA256SUMS"
    subprocess.run(["sh", "-c", again], cwd=tmp_path, check=True)
    assert import_capsule(client, (tmp_path / "again.tar").read_bytes(), "told-again")["language"] == "python"


@pytest.mark.soak  # a long race
def test_an_export_during_runs_is_one_version(client: httpx.Client, session: MakeSession, server: Server) -> None:
    """Data and files of each version belong together, and no run that is under way is in it."""
    where = session(data={"n": 0})
    increment = (
        "import json\nd = json.load(open('.session_data.json')); d['n'] += 1\n"
        "json.dump(d, open('.session_data.json', 'w')); open('log', 'a').write('x')"
    )
    done = threading.Event()

    def work() -> None:
        with server.client() as own:
            while not done.is_set():
                assert own.post(f"/api/sessions/{where}/run", json={"code": increment}).status_code == 200

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        taken = []
        for _ in range(15):
            time.sleep(0.05)
            taken.append(export_capsule(client, where))
    finally:
        done.set()
        for thread in threads:
            thread.join()
    for number, capsule in enumerate(taken):
        head = json.loads(parts(capsule)[0][1])
        assert [each["version"] for each in head["versions"]] == sorted(each["version"] for each in head["versions"])
        assert head["versions"][-1]["version"] == head["session"]["version"]
        assert {each["version"] for each in head["runs"][-50:]} <= {each["version"] for each in head["versions"]} | {
            each["version"] for each in head["runs"][:-50]
        }
        copy = import_capsule(client, capsule, f"c{number}")
        files = {
            each["path"]: each["size"] for each in client.get(f"/api/sessions/c{number}?include=files").json()["files"]
        }
        assert files.get("log", 0) == copy["data"]["n"] == copy["version"] - 1
    assert import_capsule(client, taken[-1], "last")["version"] > 5


def test_memory_stays_flat_while_a_large_session_moves(
    client: httpx.Client, session: MakeSession, run: Run, server: Server
) -> None:
    """64 MiB are exported and imported in less than 24 MiB of memory."""
    where = session()
    run(where, "import os\nfor n in range(4): open(f'f{n}', 'wb').write(os.urandom(16 << 20))")
    export_capsule(client, session(session_id="warm"))
    before = server.reset_peak()
    with client.stream("GET", f"/api/sessions/{where}/capsule") as answer:
        chunks = list(answer.iter_raw())
    assert sum(map(len, chunks)) > 64 << 20
    assert server.peak_resident_bytes - before < 24 << 20, "the export"
    before = server.reset_peak()
    answer = client.post("/api/sessions/import?id=big", content=iter(chunks), headers=TAR)
    assert answer.status_code == 201, answer.text
    assert server.peak_resident_bytes - before < 24 << 20, "the import"
    assert run("big", "import os; print(sum(os.path.getsize(f'f{n}') for n in range(4)))")["stdout"] == f"{64 << 20}\n"
