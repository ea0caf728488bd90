"""`kill -9` at each step of every operation that changes a session: the old state or the new, and nothing left behind.

By default a few steps of some operations are tried, `make soak` tries every step of each; see failpoints.py for what a
step is.
Services that break one rule each show that these tests would notice.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import sqlite3
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import capsules
from tests.conftest import assert_nothing_left, eventually, is_running, mounts
from tests.hostile.failpoints import Disk, Step, calls_of, kill_at, recorded
from tests.hostile.served import ForkedServer
from tests.soaking import soak_the_rest

pytestmark = pytest.mark.usefixtures("strace")

KEPT = 4
PARTS = 16
LARGE = os.urandom(1_500_000)
RUN = """
import json, os
with open('.session_data.json') as f: data = json.load(f)
n = data['n'] = data['n'] + 1
with open('.session_data.json', 'w') as f: json.dump(data, f)
with open('log', 'a') as f: f.write(f'{n}\\n')
for i in range(3):
    os.makedirs(f'new/{n}/{i}')
    with open(f'new/{n}/{i}/file', 'w') as f: f.write(f'{n} {i} ' * 500)
with open('same', 'w') as f: f.write(f'all of {n}')
print(n)
"""


@dataclass(frozen=True)
class State:
    """What clients see of a session, without the records of its runs."""

    version: int
    data: dict[str, Any]
    files: dict[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class SessionView:
    """A session's state and its runs, newest first."""

    state: State
    runs: tuple[tuple[str, str, bool, int], ...]
    """Id, status, whether it was committed and the version then."""


class Service:
    """A service on a data directory that outlives it, and one session in it."""

    def __init__(self, directory: Path, weakness: str | None = None) -> None:
        self.before = mounts()
        self.log = directory / "strace"
        settings = {
            "ERA_ISOLATION": "bubblewrap",
            "ERA_VERSIONS_KEPT": str(KEPT),
            "ERA_GRACE_SECONDS": "0",
        }
        self.server = ForkedServer(directory / "data", settings, named_weakness=weakness)
        self.server.start()
        try:
            self._open()
        except BaseException:
            self.kill()
            raise

    def _open(self) -> None:
        self.disk = Disk(self.server.data_dir)
        self.client = self.server.client()
        self.kills = 0
        self.ok("POST", "/api/sessions", json={"language": "python", "session_id": "s", "data": {"n": 0}})
        self.capsule = self._large_capsule()
        self.get_going()

    def ok(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request that must succeed."""
        answer = self.client.request(method, path, **options)
        assert answer.status_code < 300, f"{method} {path}: {answer.text}"
        return answer

    def get_going(self) -> None:
        """Start every kind of thread, and the session's sandbox."""
        self.run()
        self.ok("PUT", "/api/sessions/s/files/large", content=LARGE)
        self.load("other")
        self.drop("other")

    def look(self, session: str = "s") -> SessionView:
        """Read the session, check that all of its content is there, and return it."""
        shown = self.ok("GET", f"/api/sessions/{session}").json()
        try:
            archive = self.ok("GET", f"/api/sessions/{session}/archive").content
        except httpx.RemoteProtocolError:
            raise AssertionError("not all of its files are there") from None
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
        runs = tuple(
            (each["run_id"], each["status"], each["state"]["committed"], each["state"]["version"])
            for each in self.ok("GET", f"/api/sessions/{session}/runs").json()["runs"]
        )
        self._check_history(session, files)
        return SessionView(State(shown["version"], shown["data"], files), runs)

    def _check_history(self, session: str, files: dict[str, bytes]) -> None:
        """Check every version and its content by exporting a capsule."""
        parts = capsules.parts(self.ok("GET", f"/api/sessions/{session}/capsule").content)
        digests = {name.removeprefix("objects/"): capsules.digest(content) for name, content in parts[3:]}
        assert all(name == digest for name, digest in digests.items())
        assert {capsules.digest(content) for content in files.values()} <= digests.keys()
        document = json.loads(parts[0][1])
        assert document["versions"][-1]["version"] == document["session"]["version"]
        runs = {run["id"]: run for run in document["runs"]}
        for version in document["versions"]:
            if version["cause"] == "run":
                run = runs[version["run_id"]]
                assert (run["committed"], run["version"]) == (True, version["version"]), "run and version moved apart"

    def attempt(self, step: Step, act: Callable[[], object]) -> bool | None:
        """Kill the service at a step of `act` and restart it; returns whether `act` was acknowledged, None if it never
        came to that step."""
        acknowledged = False

        def try_it() -> None:
            nonlocal acknowledged
            with suppress(httpx.TransportError):
                act()
                acknowledged = True

        processes = self.server.descendants()
        assert self.server.process is not None
        if not kill_at(self.server.pid, step, self.log, try_it):
            assert acknowledged
            return None
        assert self.server.process.wait(60) == -signal.SIGKILL
        self.kills += 1
        assert eventually(lambda: not any(map(is_running, processes))), "processes were left behind"
        assert mounts() == self.before
        self.server.start()
        self.client.close()
        self.client = self.server.client()
        assert self.disk.leftovers() == []
        return acknowledged

    def collect(self) -> None:
        """Collect garbage, and check that the blobs left are those that rows name."""
        os.kill(self.server.pid, signal.SIGUSR1)
        needed = self._needed
        eventually(lambda: self.disk.blobs() == needed() and not self._hidden())
        assert self._hidden() == 0, "a session that is not complete was left"
        assert self.disk.blobs() - needed() == set(), "blobs were left that nothing names"
        assert needed() - self.disk.blobs() == set(), "blobs are gone that a row names"

    def kill(self) -> None:
        """End it, whatever state it is in."""
        if self.server.process is not None and self.server.process.poll() is None:
            self.server.stop(signal.SIGKILL)

    def close(self) -> None:
        self.client.close()
        processes = self.server.descendants() if self.server.process else []
        if self.server.process is not None:
            self.server.stop()
        assert_nothing_left(self.before, processes, self.server.data_dir)

    def _rows(self, query: str) -> list[Any]:
        with closing(sqlite3.connect(self.server.data_dir / "era.sqlite")) as database:
            return [row[0] for row in database.execute(query)]

    def _hidden(self) -> int:
        """The number of sessions that are deleted but not purged."""
        return len(self._rows("select key from sessions where deleted_at is not null"))

    def _needed(self) -> set[str]:
        """The digests of all blobs that some row names, directly or by a tree."""
        marked: set[str] = set()
        trees = set(self._rows("select distinct snapshot_root from versions where snapshot_root is not null"))
        while trees:
            digest = trees.pop()
            marked.add(digest)
            content = (self.server.data_dir / "blobs" / digest[:2] / digest).read_bytes()
            assert hashlib.sha256(content).hexdigest() == digest
            for kind, _, child, *_ in json.loads(content):
                if kind == "dir" and child not in marked:
                    trees.add(child)
                elif kind == "file":
                    marked.add(child)
        for name in ("stdout_digest", "stderr_digest", "piece_order_digest"):
            marked |= set(self._rows(f"select {name} from outputs where {name} is not null"))
        return marked

    # -- what is done to the session, and what it makes of a state ---------------------------------------------------

    def run(self) -> None:
        outcome = self.ok("POST", "/api/sessions/s/run", json={"code": RUN}).json()
        assert outcome["state"]["committed"], outcome

    def put(self) -> None:
        self.ok("PUT", "/api/sessions/s/files/put/in/here", content=b"%d" % self.number + LARGE)

    def rollback(self) -> None:
        self.ok("POST", "/api/sessions/s/rollback", json={"version": self.target})

    def duplicate(self) -> None:
        self.ok("POST", "/api/sessions/s/duplicate", json={"id": "copy"})

    def load(self, name: str = "copy") -> None:
        headers = {"Content-Type": "application/x-tar"}
        self.ok("POST", f"/api/sessions/import?id={name}", content=self.capsule, headers=headers)

    def sweep(self) -> None:
        """Collect garbage, of which `prepare` has made some."""
        os.kill(self.server.pid, signal.SIGUSR1)
        needed = self._needed()
        assert eventually(lambda: self.disk.blobs() == needed or not is_running(self.server.pid))
        if not is_running(self.server.pid):
            raise httpx.TransportError("the service is gone")

    def drop(self, session: str) -> None:
        """Purge a session, if it exists."""
        if self.client.get(f"/api/sessions/{session}").status_code != 404:
            self.ok("DELETE", f"/api/sessions/{session}?purge=true")

    number = 0
    target = 1

    def prepare(self, name: str) -> None:
        """Prepare what an operation needs."""
        self.number += 1
        if name in ("duplicate", "load"):
            self.drop("copy")
            self.capsule = self._large_capsule()
        if name == "rollback":
            self.target = self.look().state.version - 1
        if name == "sweep":
            for _ in range(KEPT):
                self.number += 1
                self.put()
            self.ok("PUT", "/api/sessions/s/files/put/in/here", content=b"small")

    def _large_capsule(self) -> bytes:
        """A capsule with more versions and runs than a few transactions take."""
        content = [os.urandom(400_000), b"x" * 20]
        root = capsules.tree(*(capsules.file(name, each) for name, each in zip("ab", content, strict=True)))
        versions = [capsules.version(root, version=n, data={"n": n, "pad": "x" * 140_000}) for n in range(1, 4)]
        runs = [capsules.run(id=f"run_elsewhere_{n}", version=1, committed=False) for n in range(120)]
        return capsules.capsule(capsules.document(capsules.session(version=3), versions, runs), root, *content)


def _after(name: str, before: State, service: Service, old: State) -> State:
    """The state after an operation on `before`."""
    following = replace(before, version=before.version + 1)
    match name:
        case "run":
            n = before.data["n"] + 1
            files = {f"new/{n}/{i}/file": f"{n} {i} ".encode() * 500 for i in range(3)}
            files |= {"log": before.files.get("log", b"") + b"%d\n" % n, "same": b"all of %d" % n}
            return replace(following, data={"n": n}, files={**before.files, **files})
        case "put":
            return replace(following, files={**before.files, "put/in/here": b"%d" % service.number + LARGE})
        case "rollback":
            return replace(old, version=before.version + 1)
        case _:
            return before


OPERATIONS = ("run", "put", "rollback", "duplicate", "load", "sweep")


class KilledOperation:
    """One operation, killed at one step after another."""

    def __init__(self, service: Service, name: str) -> None:
        self.service, self.name = service, name
        self.act: Callable[[], object] = getattr(service, name)
        self.acknowledged = 0

    def steps(self) -> list[Step]:
        """The steps of the operation when nothing is killed."""
        self.service.prepare(self.name)
        return recorded(self.service.server.pid, self.service.log, self.act)

    def kill_at(self, step: Step) -> bool:
        """Kill the operation at a step, and check what is left; returns False if it never came to that step. Fails
        unless the state is all old or all new."""
        service = self.service
        service.prepare(self.name)
        before = service.look()
        old = self._state_of(service.target) if self.name == "rollback" else before.state
        expected = _after(self.name, before.state, service, old)
        acknowledged = service.attempt(step, self.act)
        if acknowledged is None:
            return False
        self.acknowledged += acknowledged
        after = service.look()
        assert after.state in (before.state, expected), f"{step}: a mixture"
        is_new = after.state == expected != before.state
        assert is_new or not acknowledged or expected == before.state, f"{step}: what was acknowledged is gone"
        self._check_runs(before, after, is_new)
        if self.name in ("duplicate", "load"):
            self._check_copy(acknowledged)
        if not is_new:  # The operation can be repeated.
            service.drop("copy")
            self.act()
            assert service.look().state == expected, f"{step}: what was left is in the way"
        service.get_going()
        return True

    def kill_at_all(self, thread: str, call: str, last: int) -> None:
        """Kill the operation at each call of a thread, the last one first."""
        for n in range(last, 0, -1):
            self.kill_at(Step(thread, call, n))

    def _state_of(self, version: int) -> State:
        """The state of an old version, read from a duplicate of it."""
        body = {"id": "then", "from_version": version}
        self.service.ok("POST", "/api/sessions/s/duplicate", json=body)
        found = self.service.look("then").state
        self.service.drop("then")
        return found

    def _check_runs(self, before: SessionView, after: SessionView, is_new: bool) -> None:
        """Check that there is at most one new run, and that its record says how it ended."""
        new = after.runs[: len(after.runs) - len(before.runs)]
        assert after.runs[len(new) :] == before.runs
        if self.name != "run":
            assert new == ()
        elif is_new:
            assert [run[1:] for run in new] == [("ok", True, after.state.version)]
        else:
            assert [run[1:3] for run in new] in ([], [("lost", False)])

    def _check_copy(self, acknowledged: bool) -> None:
        """Check that the copy is whole or not there."""
        answer = self.service.client.get("/api/sessions/copy")
        if answer.status_code == 404:
            assert not acknowledged
            return
        copy = self.service.look("copy")
        if self.name == "load":
            assert (copy.state.version, copy.state.data["n"], set(copy.state.files)) == (3, 3, {"a", "b"})
            assert len(self.service.ok("GET", "/api/sessions/copy/runs?limit=1000").json()["runs"]) == 120
        else:
            assert copy.state == replace(self.service.look().state, version=1)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(tmp_path)
    yield made
    made.close()
    assert "Traceback" not in made.server.log, made.server.log


CONTENT = ("era-files_0", "era-transfer_0", "era-capsules_0")


def few_of(steps: Sequence[Step], chance: random.Random) -> list[Step]:
    """A random step of a random kind: one kind writes rows, one content, one the answer."""
    kinds = [[step for step in steps if step.thread in threads] for threads in (("era-write_0",), CONTENT, ("main",))]
    there = [kind for kind in kinds if kind]
    return [chance.choice(kind) for kind in chance.sample(there, 1)]


@pytest.mark.parametrize(
    "names", soak_the_rest([("run", "put", "rollback", "load", "sweep"), OPERATIONS], 1), ids=" ".join
)
def test_kill_9_at_some_steps(names: Sequence[str], service: Service) -> None:
    chance = random.Random(int(os.environ.get("SEED", "1")))
    for name in names:
        operation = KilledOperation(service, name)
        for step in few_of(operation.steps(), chance):
            operation.kill_at(step)
    service.collect()
    assert service.kills > len(names) // 2  # some have no kill in time


@pytest.mark.soak
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", OPERATIONS)
def test_kill_9_at_every_step(name: str, part: int, service: Service) -> None:
    """For each thread and call, n = 1, 2, 3 … until the operation gets through. Each part takes every 16th n."""
    operation = KilledOperation(service, name)
    for thread, call in calls_of(operation.steps()):
        n = 1 + part
        while operation.kill_at(Step(thread, call, n)):
            n += PARTS
    service.collect()


@pytest.mark.parametrize(
    ("weakness", "name", "thread", "call", "sign"),
    [
        pytest.param("rows before blobs", "run", "main", "write", "not all of its files", marks=pytest.mark.soak),
        ("no transactions", "run", "era-write_0", "fdatasync", "moved apart"),
        pytest.param("blobs in place", "run", "era-files_0", "write", "not all of its files", marks=pytest.mark.soak),
        pytest.param("no lost runs", "run", "era-files_0", "fsync", "running", marks=pytest.mark.soak),
        pytest.param("imports visible early", "load", "era-write_0", "fdatasync", "exists", marks=pytest.mark.soak),
    ],
)
def test_a_weakened_service_fails_these_tests(
    weakness: str, name: str, thread: str, call: str, sign: str, tmp_path: Path
) -> None:
    service = Service(tmp_path, weakness)
    try:
        operation = KilledOperation(service, name)
        last = calls_of(operation.steps())[thread, call]
        with pytest.raises(AssertionError, match=sign):
            operation.kill_at_all(thread, call, last)
    finally:
        service.client.close()
        service.kill()
