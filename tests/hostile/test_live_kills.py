"""The service is killed at random moments while clients do all that can be done in a live session, at once."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from era.drivers.cgroups import cgroup_name
from tests.api.live import PATIENCE, Terminal, process, socket, start
from tests.conftest import MakeServer, Server, assert_nothing_left, built_with, cgroups, eventually, is_running, mounts
from tests.gvisor import needs_gvisor

COUNT = """
import json
with open('.session_data.json') as file: data = json.load(file)
data['n'] = data.get('n', 0) + 1
with open('.session_data.json', 'w') as file: json.dump(data, file)
with open('log', 'a') as file: file.write('.')
"""
CELL = """
import json
n = globals().get('n', 0) + 1
with open('.session_data.json') as file: data = json.load(file)
data['cells'] = data.get('cells', 0) + 1
with open('.session_data.json', 'w') as file: json.dump(data, file)
with open('cells', 'a') as file: file.write('.')
n
"""
NODE_CELL = """
globalThis.n = (globalThis.n ?? 0) + 1;
var fs = require('node:fs');
var data = JSON.parse(fs.readFileSync('.session_data.json'));
data.cells = (data.cells ?? 0) + 1;
fs.writeFileSync('.session_data.json', JSON.stringify(data));
fs.appendFileSync('cells', '.');
n
"""
CONTEXTS = {"s": CELL, "j": NODE_CELL}
"""Sessions, and what each cell in the context of each is."""

RESTARTED = {"kept": False, "reason": "The service was restarted since, and its interpreter ended with it."}
TICK = "i=0; while :; do i=$((i+1)); echo $i > t; mv t ticks; sleep 0.01; done"
GONE = "The service stopped while this process ran."


@dataclass
class Told:
    """What the service has acknowledged."""

    runs: int = 0
    cells: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CONTEXTS, 0))
    """By session."""

    puts: int = 0
    version: int = 0
    checkpoint: tuple[int, bytes] | None = None
    """The version of the last one that was also read, and what it holds of `ticks`."""

    started: list[str] = field(default_factory=list)
    ended: dict[str, int] = field(default_factory=dict)
    """Exit codes by process."""

    said: int = 0
    """Lines that terminals have answered."""


class Clients:
    """Clients of two sessions, each of which does one thing over and over until the service is gone."""

    def __init__(self, server: Server, told: Told) -> None:
        self.told = told
        self.problems: list[BaseException] = []
        self._server = server
        work = [self.run, self.put, self.checkpoint, self.process, self.terminal]
        work += [partial(self.cell, session) for session in CONTEXTS]
        self._cells = dict.fromkeys(CONTEXTS, 0)
        """Of this life of the service."""

        self._idle = dict.fromkeys(map(str, work))
        """Those of which nothing has been acknowledged yet, by this life of the service."""

        self._threads = [threading.Thread(target=self._repeat, args=(each,)) for each in work]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()
        assert not self.problems, self.problems

    def are_all_served(self) -> bool:
        """Whether each has done what it does, or something is wrong."""
        return not self._idle or bool(self.problems)

    def _repeat(self, work: Callable[[httpx.Client], None]) -> None:
        with self._server.client(timeout=PATIENCE) as client:
            try:
                while True:
                    work(client)
                    self._idle.pop(str(work), None)
            except (httpx.TransportError, OSError):
                return  # it was killed
            except BaseException as problem:
                self.problems.append(problem)

    def run(self, client: httpx.Client) -> None:
        answer = _answer(client.post("/api/sessions/s/run", json={"code": COUNT}))
        assert answer["state"]["committed"], answer
        self.told.runs += 1

    def cell(self, where: str, client: httpx.Client) -> None:
        is_new = self.told.cells[where] == 0
        asked = {"code": CONTEXTS[where], "context": "main"}
        answer = _answer(client.post(f"/api/sessions/{where}/run", json=asked))
        assert answer["state"]["committed"], answer
        self.told.cells[where] += 1
        self._cells[where] += 1
        assert [result["data"]["text/plain"] for result in answer["results"]] == [str(self._cells[where])], answer
        if self._cells[where] > 1:
            assert answer["memory"] == {"kept": True, "reason": None}, answer
        elif not is_new:
            assert answer["memory"] == RESTARTED, answer

    def put(self, client: httpx.Client) -> None:
        _answer(client.put("/api/sessions/s/files/put", content=str(self.told.puts + 1).encode()))
        self.told.puts += 1

    def checkpoint(self, client: httpx.Client) -> None:
        made = _answer(client.post("/api/sessions/s/checkpoint"))
        assert made["version"] >= self.told.version
        self.told.version = made["version"]
        shown = client.get(f"/api/sessions/s/versions/{made['version']}/files/ticks")
        if shown.status_code == 200:
            self.told.checkpoint = (made["version"], shown.content)

    def process(self, client: httpx.Client) -> None:
        self.told.started.append(name := start(client, "s", "read line; exit $line", stdin=True))
        _answer(client.post(f"/api/sessions/s/processes/{name}/stdin", content=b"7\n"))
        while (record := process(client, "s", name))["status"] == "running":
            time.sleep(0.01)
        assert (record["status"], record["exit_code"]) == ("ended", 7), record
        self.told.ended[name] = 7

    def terminal(self, _: httpx.Client) -> None:
        with socket(self._server, "s/terminal") as opened:
            shell = Terminal(opened)
            for number in range(1, 20):
                shell.send(f"echo said$(({number} + 1000))\n")
                shell.until(f"said{number + 1000}")
                self.told.said += 1
            shell.send("exit\n")
            shell.until_closed()


def _answer(answer: httpx.Response) -> dict[str, Any]:
    assert answer.is_success, answer.text
    found: dict[str, Any] = answer.json()
    return found


def _as_told(told: int, found: int) -> int:
    """How often something was done: as often as was told, or once more."""
    assert told <= found <= told + 1
    return found


def _text(client: httpx.Client, where: str, path: str) -> str:
    """What a file holds; nothing where there is none yet."""
    answer = client.get(f"/api/sessions/{where}/files/{path}")
    assert answer.status_code in (200, 404), answer.text
    return answer.text if answer.is_success else ""


def check(client: httpx.Client, told: Told) -> None:
    """Assert that all that was acknowledged is there, and that records are honest. What was under way when the service
    was killed may be there or not."""
    session = _answer(client.get("/api/sessions/s"))
    assert session["version"] >= told.version
    told.runs = _as_told(told.runs, session["data"].get("n", 0))
    assert len(_text(client, "s", "log")) == told.runs, "files and data moved apart"
    told.puts = _as_told(told.puts, int(_text(client, "s", "put") or "0"))
    for where, cells in told.cells.items():
        session = _answer(client.get(f"/api/sessions/{where}"))
        assert session["status"] == "idle"
        told.cells[where] = _as_told(cells, session["data"].get("cells", 0))
        assert len(_text(client, where, "cells")) == told.cells[where], "files and data moved apart"
        assert _answer(client.get(f"/api/sessions/{where}/contexts"))["contexts"] == []
    if told.checkpoint is not None:
        version, ticks = told.checkpoint
        shown = client.get(f"/api/sessions/s/versions/{version}/files/ticks")
        assert shown.status_code == 404 or shown.content == ticks, "a version has changed"
    for record in _answer(client.get("/api/sessions/s/processes"))["processes"]:
        assert record["status"] in ("ended", "lost"), record
        assert record["ended_at"], record
        if record["status"] == "lost":
            assert (record["reason"], record["exit_code"], record["output_bytes"]) == (GONE, None, None), record
    for name in told.started[-3:]:
        record = process(client, "s", name)
        if name in told.ended:
            assert (record["status"], record["exit_code"]) == ("ended", told.ended[name]), record
    assert _answer(client.get("/api/runs", params={"status": "running"}))["runs"] == []


def terminals() -> int:
    """How many pseudoterminals there are on this machine (pty(7))."""
    return int(Path("/proc/sys/kernel/pty/nr").read_text())


def kill_once(server: Server, told: Told, seconds: float, *, served: bool) -> None:
    """Kill the service when clients have been at work for so long, `served` with something acknowledged to each first,
    and start it again."""
    assert server.process is not None
    with server.client() as client:
        ticks = start(client, "s", TICK, tag="ticks")
    clients = Clients(server, told)
    if served:
        assert eventually(clients.are_all_served, 10 * PATIENCE)
    time.sleep(seconds)
    server.process.send_signal(signal.SIGSTOP)
    processes, groups = server.descendants(), list(map(Path, cgroups(cgroup_name(server.data_dir))))
    directories = list((server.data_dir / "live").glob("sb-*"))
    server.stop(signal.SIGKILL)
    clients.join()
    assert eventually(lambda: not any(map(is_running, processes)))
    assert eventually(lambda: not any(map(_members, groups)))
    server.start()
    with server.client() as client:
        record = process(client, "s", ticks)
        assert (record["status"], record["reason"]) == ("lost", GONE)
        check(client, told)
    assert eventually(lambda: not any(path.exists() for path in (*groups, *directories)))


@pytest.mark.parametrize(
    ("isolation", "kills"),
    [
        ("bubblewrap", 1),
        pytest.param("bubblewrap", 30, marks=pytest.mark.soak),
        pytest.param("gvisor", 10, marks=[needs_gvisor, pytest.mark.soak]),
    ],
)
def test_kills_at_random_moments_with_live_sessions(own_server: MakeServer, kills: int, isolation: str) -> None:
    """Nothing acknowledged is lost, records are honest, and no process, mount, control group or terminal is left. Every
    fourth kill may come before anything was acknowledged."""
    chance = random.Random(15)
    before, terminals_before = mounts(), terminals()
    server = own_server(weakness=built_with("era.parts.LiveSessions", checkpoint_seconds=0.5), isolation=isolation)
    with server.client() as client:
        _answer(client.post("/api/sessions", json={"language": "python", "session_id": "s"}))
        _answer(client.post("/api/sessions", json={"language": "node", "session_id": "j"}))
    told = Told()
    for kill in range(1, kills + 1):
        kill_once(server, told, chance.uniform(0, 2), served=kill % 4 != 0)
        assert mounts() == before
        print(f"{kill} kills: {told.runs} runs, {told.cells} cells, {told.puts} puts, {told.said} lines", flush=True)
    assert kills < 4 or min(told.runs, told.puts, *told.cells.values()) >= kills / 2, "some were hardly tried"
    processes = server.descendants()
    assert server.stop() == 0
    assert "Traceback" not in server.log, server.log
    assert_nothing_left(before, processes, server.data_dir)
    assert eventually(lambda: terminals() < terminals_before + kills / 2), "others may have some on this machine"


def _members(group: Path) -> list[str]:
    """The processes in a control group and those below it."""
    found: list[str] = []
    for listed in group.rglob("cgroup.procs"):
        with suppress(OSError):  # it is gone
            found += listed.read_text().split()
    return found
