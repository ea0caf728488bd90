"""Many runs in many sessions, with crashes, timeouts and bombs among them, and sandboxes that are killed under them.

At the end everything that was acknowledged is there, and the service is as it was.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from era.drivers.cgroups import cgroup_name
from era.drivers.launch import FIRST_UID
from era.languages import runtimes
from tests.conftest import MakeServer, Server, assert_nothing_left, cgroups, eventually, mounts

COUNT = """
import json
with open('.session_data.json') as f: data = json.load(f)
data['n'] += 1
with open('.session_data.json', 'w') as f: json.dump(data, f)
"""
LONG, SHORT = 60, 0.5
BAD = {
    "raises": (LONG, {"failed"}, "raise SystemExit(3)"),
    "aborts": (LONG, {"killed"}, "import os; os.abort()"),
    "never ends": (SHORT, {"timeout"}, "while True: pass"),
    "ignores SIGTERM": (SHORT, {"timeout"}, "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"),
    "leaves a daemon": (LONG, {"ok"}, "import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(60)"),
    "a fork bomb": (SHORT, {"timeout", "oom"}, "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"),
    "a memory bomb": (LONG, {"oom", "failed"}, "held = [bytearray(b'x') * (1 << 20) for _ in range(1000)]"),
    "endless output": (SHORT, {"timeout"}, "import os\nwhile True: os.write(1, b'x' * 65536)"),
    "fills its disk": (LONG, {"disk_full"}, "for n in range(50): open(f'{n}', 'wb').write(bytes(1 << 20))"),
    "breaks its state": (LONG, {"ok"}, "open('.session_data.json', 'w').write('[')"),
}
"""Programs that misbehave and count nothing: their timeout in seconds, the statuses they may end with, their code."""

VISIT = 8
READY = len(runtimes())
LIMITS = {"memory_mb": 96, "pids": 32, "disk_mb": 8, "output_bytes": 1 << 16}


@dataclass
class Load:
    """What clients did to a server, and what they were answered."""

    server: Server
    sessions: int
    counted: Counter[str] = field(default_factory=Counter)
    """Increments that were acknowledged, by session."""

    reported_killed: int = 0
    killed: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def visit(self, number: int) -> None:
        """Make a few runs in one session, one after the other."""
        chance = random.Random(number)
        where = f"s{chance.randrange(self.sessions)}"
        with self.server.client() as client:
            for _ in range(VISIT):
                if chance.random() < 0.92:
                    self._count(client, where)
                else:
                    self._misbehave(client, where, chance)

    def _count(self, client: httpx.Client, where: str) -> None:
        """Increment the counter of a session."""
        answer = client.post(f"/api/sessions/{where}/run", json={"code": COUNT, "timeout": 60})
        assert answer.status_code == 200, answer.text
        body = answer.json()
        with self.lock:
            if body["state"]["committed"] and body["status"] == "ok":
                self.counted[where] += 1
            else:
                assert body["status"] == "killed", body  # its sandbox was killed
                self.reported_killed += 1

    def _misbehave(self, client: httpx.Client, where: str, chance: random.Random) -> None:
        """Run one of the BAD programs."""
        kind = chance.choice(list(BAD))
        timeout, outcomes, code = BAD[kind]
        answer = client.post(f"/api/sessions/{where}/run", json={"code": code, "timeout": timeout, "atomic": True})
        assert answer.status_code == 200, answer.text
        status = answer.json()["status"]
        with self.lock:
            self.seen[kind] += 1
            if status not in outcomes:
                assert status == "killed", (kind, answer.json())
                self.reported_killed += 1

    def kill_a_sandbox(self, chance: random.Random) -> None:
        """Kill PID 1 of a sandbox from outside, as the kernel might."""
        candidates = [pid for pid in self.server.descendants() if _is_first_inside(pid)]
        if candidates:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(candidates), signal.SIGKILL)
            self.killed += 1


def _is_first_inside(pid: int) -> bool:
    """Whether a process is PID 1 of a sandbox."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    found = re.search(r"NSpid:\t(.*)", status)
    return found is not None and found[1].split()[1:] == ["1"]


def stress(own_server: MakeServer, *, runs: int, sessions: int) -> None:
    """Make so many runs in so many sessions, and check what is left of them."""
    before, chance = mounts(), random.Random(runs)
    server = own_server(max_warm="12", outputs_kept="5", versions_kept="5", spares="1")
    load = Load(server, sessions)
    with server.client() as client:
        for number in range(sessions):
            body = {"language": "python", "session_id": f"s{number}", "data": {"n": 0}, "limits": LIMITS}
            assert client.post("/api/sessions", json=body).status_code == 201
    with ThreadPoolExecutor(4) as clients:
        visits = -(-runs // VISIT)
        batch = max(visits // 20, 1)
        settled = 0
        for start in range(0, visits, batch):
            work = [clients.submit(load.visit, number) for number in range(start, min(start + batch, visits))]
            load.kill_a_sandbox(chance)
            for done in work:
                done.result()
            if start == batch * 4:
                settled = server.resident_bytes
        grown = server.resident_bytes - settled
    with server.client() as client:
        for number in range(sessions):
            held = client.get(f"/api/sessions/s{number}").json()["data"]["n"]
            assert held == load.counted[f"s{number}"], f"session s{number}"
        (busiest, _), *_ = load.counted.most_common(1)
        uid = client.get(f"/api/sessions/{busiest}/runs").json()["runs"][0]["enforced"]["uid"]
        assert os.geteuid() != 0 or (uid - FIRST_UID) % 100_000 < 40, "uids of sandboxes that are gone serve again"
        assert client.delete("/api/sessions").status_code == 200
        assert eventually(lambda: client.get("/health").json()["sandboxes"] == {"live": 0, "busy": 0, "ready": READY})
    assert grown < 20 << 20, f"the service grew by {grown >> 20} MiB"
    assert load.reported_killed <= load.killed, "runs were reported killed whose sandboxes nobody killed"
    groups = {Path(group).name for group in cgroups(cgroup_name(server.data_dir))}
    assert len(groups) in (0, READY), "only those that are ready have one"
    assert len(os.listdir(f"/proc/{server.pid}/fd")) < 120
    assert "Traceback" not in server.log, server.log
    processes = server.descendants()
    assert server.stop() == 0
    assert_nothing_left(before, processes, server.data_dir)


def test_a_short_time_under_load(own_server: MakeServer) -> None:
    stress(own_server, runs=120, sessions=20)
