"""A server whose clients count while it is backed up, and whether a restored one is as of one moment."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from era.operation.server_data import Advance
from tests.conftest import Server, eventually


def quiet(_total: int) -> Advance:
    """A progress bar that nobody sees."""
    return lambda _: None


SESSIONS = ("a", "b")
STEP = """
import json, pathlib
data = json.load(open('.session_data.json')); n = data['n'] = data.get('n', 0) + 1
json.dump(data, open('.session_data.json', 'w'))
pathlib.Path('deep/er').mkdir(parents=True, exist_ok=True)
pathlib.Path('deep/er/n.txt').write_text(str(n)); pathlib.Path('deep/large.bin').write_bytes(bytes([n % 256]) * 500_000)
print(str(n) * 100_000)
"""


@dataclass
class Known:
    """How often clients had counted in each session, before the backup and after it."""

    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)


@contextmanager
def under_load(server: Server, known: Known) -> Iterator[None]:
    """Fill a server, and let clients count in it for as long as the block lasts."""
    done = dict.fromkeys(SESSIONS, 0)
    stop = threading.Event()

    def work(name: str) -> None:
        with server.client() as client:
            while not stop.is_set():
                answer = client.post(f"/api/sessions/{name}/run", json={"code": STEP}).json()
                assert answer["status"] == "ok", answer
                done[name] += 1

    with server.client() as client:
        for name in SESSIONS:
            assert client.post("/api/sessions", json={"language": "python", "session_id": name}).status_code == 201
        sql = {"sql": "CREATE TABLE t (x); INSERT INTO t VALUES (42)"}
        client.post("/api/storage/d1/shop/exec", json=sql).raise_for_status()
        client.put("/api/storage/kv/shop/long", json={"value": "v" * 200_000}).raise_for_status()
    threads = [threading.Thread(target=work, args=(name,)) for name in SESSIONS]
    for thread in threads:
        thread.start()
    try:
        assert eventually(lambda: min(done.values()) >= 3)
        known.before.update(done)
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        known.after.update(done)


def assert_as_of_one_moment(server: Server, known: Known) -> None:
    """Assert that a restored server has what there was at one moment between what is known, and goes on."""
    with server.client() as client:
        for name in SESSIONS:
            n = client.get(f"/api/sessions/{name}").json()["data"]["n"]
            assert known.before[name] <= n <= known.after[name]
            assert client.get(f"/api/sessions/{name}/files/deep/er/n.txt").text == str(n)
            large = client.get(f"/api/sessions/{name}/files/deep/large.bin").content
            assert large == bytes([n % 256]) * 500_000
            runs = client.get(f"/api/sessions/{name}/runs?limit=1000").json()["runs"]
            committed = [run for run in runs if run["status"] == "ok"]
            assert len(committed) == n
            newest = f"/api/sessions/{name}/runs/{committed[0]['run_id']}"
            assert client.get(newest).json()["code"] == STEP
            assert client.get(f"{newest}/stdout").text == str(n) * 100_000 + "\n"
        answer = client.post("/api/storage/d1/shop/query", json={"sql": "SELECT x FROM t"}).json()
        assert answer["results"] == [{"x": 42}]
        assert client.get("/api/storage/kv/shop/long").json()["value"] == "v" * 200_000
        assert client.post("/api/sessions/a/run", json={"code": STEP}).json()["status"] == "ok"
