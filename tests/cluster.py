"""A real cluster on this machine, as `era cluster up` makes it, and clients that append to sessions of it."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx

from tests.conftest import ERA, STOP_SECONDS, Server, assert_nothing_left, descendants, eventually, mounts

KEY = "the operator's key of a cluster"
LEASE_SECONDS = 12
"""Longer than a busy machine lets a heartbeat wait."""

ERROR_PAUSE = 0.1
"""Seconds for which a client waits after an error."""


@dataclass
class Cluster:
    """Hosts that `era cluster up` has started and watches over."""

    directory: Path
    process: subprocess.Popen[bytes]

    def told(self) -> list[dict[str, Any]]:
        """The hosts in cluster.json."""
        hosts: list[dict[str, Any]] = json.loads((self.directory / "cluster.json").read_text())["hosts"]
        return hosts

    def pid(self, number: int) -> int:
        return int(self.told()[number]["pid"])

    def log(self, number: int) -> str:
        own = self.directory / f"host-{number + 1}.log"
        under_ray = self.directory / f"host-{number + 1}" / "host.log"
        return (own if own.exists() else under_ray).read_text(errors="replace")

    def server(self, number: int) -> Server:
        """A host as the tests' other helpers know servers."""
        return Server(self.directory / f"host-{number + 1}", url=self.told()[number]["url"])

    @contextmanager
    def clients(self, *headers: tuple[str, str]) -> Iterator[list[httpx.Client]]:
        """A client of each host."""
        sent = {"Authorization": f"Bearer {KEY}", **dict(headers)}
        made = [self.server(number).client(headers=sent, timeout=60) for number in range(len(self.told()))]
        try:
            yield made
        finally:
            for client in made:
                client.close()

    @contextmanager
    def paused(self, number: int) -> Iterator[int]:
        """A host that doesn't go on within the block. It is none that has SQLite's lock at that moment, if the rows are
        there: until it went on, nobody could write."""
        pid = self._stopped(number)
        try:
            yield pid
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _stopped(self, number: int) -> int:
        while True:
            assert eventually(lambda: self.is_ready(number))
            pid = self.pid(number)
            with suppress(ProcessLookupError):  # It was started anew, and cluster.json doesn't say so yet.
                os.kill(pid, signal.SIGSTOP)
                if self._is_writable():
                    return pid
                os.kill(pid, signal.SIGCONT)
            time.sleep(0.2)  # for what it is doing to come to an end

    def _is_writable(self) -> bool:
        """Whether nobody has SQLite's lock for long, if the rows are there. It waits for a small part of a lease: the
        host that is paused meanwhile shall be alive afterwards."""
        path = self.directory / "shared" / "era.sqlite"
        if not path.exists():
            return True
        with closing(sqlite3.connect(path, timeout=LEASE_SECONDS / 12, isolation_level=None)) as database:
            try:
                database.execute("BEGIN IMMEDIATE")
                database.execute("ROLLBACK")
            except sqlite3.OperationalError:
                return False
        return True

    def kill(self, number: int) -> None:
        """`kill -9` a host, which is then started anew."""
        with suppress(ProcessLookupError):  # It is being started anew already.
            os.kill(self.pid(number), signal.SIGKILL)

    def is_ready(self, number: int) -> bool:
        """Whether a host takes calls, after it has been started anew if it was killed or declared dead."""
        try:
            with self.server(number).client() as client:
                return client.get("/ready").status_code == 200
        except (httpx.HTTPError, OSError):
            return False


def start(directory: Path, hosts: int = 2, *options: str, **settings: str) -> Cluster:
    """A cluster with these options of the command, which the caller stops."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ERA_")}
    environment |= {"ERA_ISOLATION": "bubblewrap", "ERA_SPARES": "0", "ERA_API_KEY": KEY}
    environment |= {"ERA_LEASE_SECONDS": str(LEASE_SECONDS), **settings}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    directory.mkdir(exist_ok=True)
    command = [str(ERA), "cluster", "up", "--hosts", str(hosts), "--dir", str(directory), *options]
    with (directory / "up.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        started = eventually(
            lambda: (directory / "cluster.json").exists() or process.poll() is not None, 5 * STOP_SECONDS
        )
        assert started, (directory / "up.log").read_text()
        assert process.poll() is None, (directory / "up.log").read_text()
    except BaseException:
        process.terminate()
        process.wait(4 * STOP_SECONDS)
        raise
    return Cluster(directory, process)


@contextmanager
def running(directory: Path, hosts: int = 2, *options: str, **settings: str) -> Iterator[Cluster]:
    """Such a cluster for as long as the block lasts. At the end nothing of it may be left."""
    before = mounts()
    cluster = start(directory, hosts, *options, **settings)
    try:
        yield cluster
    finally:
        below = descendants(cluster.process.pid)
        subprocess.run([str(ERA), "cluster", "down", "--dir", str(directory)], timeout=4 * STOP_SECONDS)
        assert cluster.process.wait(STOP_SECONDS) == 0
    assert not (directory / "cluster.json").exists()
    for number in range(hosts):
        assert_nothing_left(before, below, directory / f"host-{number + 1}")
        assert "Traceback" not in cluster.log(number), cluster.log(number)


class Hosts(Protocol):
    """What a history asks of a cluster."""

    def told(self) -> list[dict[str, Any]]: ...

    def server(self, number: int) -> Server: ...


@dataclass
class History:
    """What clients were told that appended tokens to the logs of sessions, through any host.

    A session's data is its log: each append is a run that adds its token, and its answer is the whole log then.
    """

    cluster: Hosts
    sessions: Sequence[str]
    patience: float = 60.0
    """Seconds for which a client waits for an answer."""

    pause: float = 0.0
    """Seconds between two appends of a client."""

    children_die: bool = False
    """A run may be cut off as its sandbox is."""

    name: str = "t"
    """What its tokens begin with."""

    answered: list[tuple[str, str, list[str]]] = field(default_factory=list)
    """Session, token, and the log that the answer had."""

    lost: list[tuple[str, str]] = field(default_factory=list)
    """Session and token of appends that were said to be lost."""

    unknown: int = 0
    """Appends that got an error in place of an answer."""

    stop: threading.Event = field(default_factory=threading.Event)
    _tokens: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def append(self, seed: int, times: int | None = None, *, again: bool = False) -> None:
        """A client: append to one session after the other, through one host after the other. Where it sends the same
        `again` after an error, with a key, it does so through the next host."""
        count = seed
        while not self.stop.is_set() and (times is None or count < seed + times):
            count += 1
            session = self.sessions[count % len(self.sessions)]
            with self._lock:
                self._tokens += 1
                token = f"{self.name}{self._tokens}"
            host = count // len(self.sessions)
            while not self._try(session, token, host, again):
                self.stop.wait(ERROR_PAUSE)  # Dozens that don't wait at all leave a small machine no time to come back.
                if not again or self.stop.is_set():
                    break
                host += 1
            self.stop.wait(self.pause)

    def goes_on(self, answers: int) -> bool:
        """Whether more than so many appends are answered besides those that were when it was called, in time."""
        before = len(self.answered)
        return bool(eventually(lambda: len(self.answered) > before + answers))

    def _try(self, session: str, token: str, host: int, again: bool) -> bool:
        """Append a token once; whether the answer says what became of it."""
        code = f"data.setdefault('log', []).append({token!r})"
        program = "import json\np = '.session_data.json'\ndata = json.load(open(p))\n" + code
        program += "\njson.dump(data, open(p, 'w'))\n"
        headers = {"Authorization": f"Bearer {KEY}", **({"Idempotency-Key": token} if again else {})}
        try:
            server = self.cluster.server(host % len(self.cluster.told()))
            with server.client(headers=headers, timeout=self.patience) as client:
                answer = client.post(f"/api/sessions/{session}/run", json={"code": program})
        except (httpx.HTTPError, OSError):
            answer = None
        with self._lock:
            if answer is None or answer.status_code != 200:
                assert answer is None or answer.status_code in (409, 429, 503), answer.text
                self.unknown += 1
                if answer is None or answer.json()["code"] != "run_lost":
                    return False
                self.lost.append((session, token))
                return True
            body = answer.json()
            if body["status"] != "ok":
                assert self.children_die, body
                if not body["state"]["committed"]:
                    self.lost.append((session, token))
                return True
            self.answered.append((session, token, body["data"]["log"]))
            return True

    def check(self, client: httpx.Client) -> None:
        """Assert that each session's log is one order of appends that explains every answer: what was answered is there
        once, each answer saw all that was before it, nothing is there twice, and nothing that was said to be lost."""
        for session in self.sessions:
            log = client.get(f"/api/sessions/{session}").json()["data"].get("log", [])
            assert len(log) == len(set(log)), f"something was done twice in {session}: {log}"
            for where, token, seen in self.answered:
                if where == session:
                    assert seen == log[: len(seen)], f"{token} saw what the others didn't: {seen} {log}"
                    assert seen[-1] == token
            for where, token in self.lost:
                assert where != session or token not in log, f"{token} was said to be lost: {log}"
