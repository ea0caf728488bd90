"""Real servers for the tests, and the check that nothing is left of what they did."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import httpx
import pytest

from era import languages
from era.app import cgroup_name

ERA = Path(sys.executable).parent / "era"
START_SECONDS = 30.0


def pytest_configure() -> None:
    """Tests look at what is mounted before and after, so those that run beside each other must not see each other's."""
    if os.geteuid() == 0 and "PYTEST_XDIST_WORKER" in os.environ:
        os.unshare(os.CLONE_NEWNS)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)


@dataclass
class Server:
    """A service of its own process, with a data directory that outlives it."""

    data_dir: Path
    settings: dict[str, str] = field(default_factory=dict)
    uid: int | None = None
    """Serve as this ordinary user; the tests must run as root then."""

    hidden: str | None = None
    """A file of the machine that it is to find empty; the tests must run as root then."""

    start_seconds: float = START_SECONDS
    process: subprocess.Popen[bytes] | None = None
    url: str = ""

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    @property
    def _log_path(self) -> Path:
        return self.data_dir.parent / f"{self.data_dir.name}.log"

    def start(self) -> Server:
        """Start it and wait until it serves."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ERA_")}
        # Not the strongest that this machine may have, which would be slower, and not the same everywhere.
        environment |= {"ERA_ISOLATION": "bubblewrap"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # or each start would compile what has changed, or isn't yet
        environment |= {"ERA_PORT": "0", "ERA_DATA_DIR": str(self.data_dir), **self.settings}
        command = [str(ERA), "serve"]
        if self.hidden is not None:
            script = f"mount --bind /dev/null '{self.hidden}' && exec '{ERA}' serve"
            command = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script]
        if self.uid is not None:
            command, extra = self._as_ordinary_user(self.uid)
            environment |= extra
        with self._log_path.open("ab") as log:
            start = log.tell()
            self.process = self._spawn(command, environment, log)
        deadline = time.monotonic() + self.start_seconds
        while not (found := re.search(r"ERA serves\s+(http://\S+)", self.log[start:])):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"The server did not start:\n{self.log[start:]}")
            time.sleep(0.02)
        self.url = found[1]
        return self

    def _spawn(self, command: list[str], environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def _as_ordinary_user(self, uid: int) -> tuple[list[str], dict[str, str]]:
        """The command that serves as `uid`. A mount namespace shows that user the project and the data directory
        outside of the directories that are closed to it."""
        self.data_dir.mkdir(exist_ok=True)
        os.chown(self.data_dir, uid, uid)
        project = Path(__file__).parent.parent
        script = (
            "mount -t tmpfs none /mnt && mkdir /mnt/project /mnt/data "
            f"&& mount --bind '{project}' /mnt/project && mount --bind '{self.data_dir}' /mnt/data && cd / "
            f"&& exec setpriv --reuid {uid} --regid {uid} --clear-groups "
            "/mnt/project/.venv/bin/python -m era.client.cli serve"
        )
        command = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script]
        return command, {"PYTHONPATH": "/mnt/project/src", "ERA_DATA_DIR": "/mnt/data", "HOME": "/mnt"}

    def stop(self, how: int = signal.SIGTERM) -> int:
        """End it by a signal and wait for it. The answer is its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(how)
        code = self.process.wait(30)
        self.process = None
        return code

    def client(self, **options: Any) -> httpx.Client:
        # Plain HTTP: reading the machine's certificates would take longer than most requests.
        return httpx.Client(base_url=self.url, trust_env=False, verify=False, **{"timeout": 60, **options})

    def descendants(self) -> list[int]:
        return descendants(self.pid)


def descendants(pid: int) -> list[int]:
    """All processes below `pid`."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, pending = [], [pid]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it is more than an entry that its parent has not taken note of."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def cgroups(name: str) -> list[str]:
    """Control groups of sandboxes below the group `name`."""
    return [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/{name}/sb-*")]


def mounts() -> list[str]:
    return Path("/proc/self/mounts").read_text().splitlines()


def eventually(what: Callable[[], Any], seconds: float = 10.0) -> Any:
    """The first truthy answer of `what`, or its last."""
    deadline = time.monotonic() + seconds
    while not (answer := what()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return answer


def assert_nothing_left(before_mounts: list[str], processes: list[int], data_dir: Path, group: str = "") -> None:
    """After a server has ended: no process, mount, cgroup or live directory of it."""
    eventually(lambda: not any(map(is_running, processes)))
    assert [pid for pid in processes if is_running(pid)] == []
    assert mounts() == before_mounts
    live = data_dir / "live"
    assert not live.exists() or not list(live.iterdir())
    assert cgroups(group or cgroup_name(data_dir)) == []


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that only need a server. At the end nothing of it may be left."""
    before = mounts()
    data_dir = tmp_path_factory.mktemp("shared") / "data"
    server = Server(data_dir).start()
    yield server
    processes = server.descendants()
    assert server.stop() == 0, server.log
    assert_nothing_left(before, processes, data_dir)
    assert "Traceback" not in server.log, server.log


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """The shared server, with a leak check after the test: sessions go, and with them all they held."""
    quiet = eventually(lambda: _at_rest(shared_server))
    assert quiet, "the server was not at rest before the test"
    fds = _fds(shared_server.pid)
    processes = len(shared_server.descendants())
    yield shared_server
    with shared_server.client() as client:
        assert client.delete("/api/sessions").status_code == 200
        for kind, namespace in {(each["type"], each["namespace"]) for each in _stored(client)}:
            assert client.delete(f"/api/storage/{kind}/{quote(namespace, safe='')}").status_code == 200
    assert eventually(lambda: _at_rest(shared_server)), "sandboxes were left behind"
    assert eventually(lambda: len(shared_server.descendants()) <= processes), "processes were left behind"
    assert eventually(lambda: _fds(shared_server.pid) <= fds + 4), "descriptors were left open"
    assert len(list((shared_server.data_dir / "live").iterdir())) == len(languages.runtimes())


def _stored(client: httpx.Client) -> list[dict[str, str]]:
    """What is in the storage."""
    listed: list[dict[str, str]] = client.get("/api/resources/list", params={"limit": 1000}).json()["resources"]
    return listed


def _at_rest(server: Server) -> bool:
    with server.client() as client:
        sandboxes = client.get("/health").json()["sandboxes"]
    return bool(sandboxes == {"live": 0, "busy": 0, "ready": len(languages.runtimes())})


def _fds(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Makes servers of the test's own, which may be killed and started again on their data."""
    before = mounts()
    made: list[Server] = []

    def make(uid: int | None = None, hidden: str | None = None, **settings: str) -> Server:
        name = f"data{len(made)}"
        values = {f"ERA_{key.upper()}": value for key, value in settings.items()}
        server = Server(tmp_path / name, values, uid, hidden)
        made.append(server)
        return server.start()

    yield make
    for server in made:
        processes = server.descendants() if server.process else []
        if server.process is not None:
            server.stop()
        assert_nothing_left(before, processes, server.data_dir)


type Run = Callable[..., dict[str, Any]]


@pytest.fixture
def session(client: httpx.Client) -> Callable[..., str]:
    """Makes a session; the answer is its id."""

    def make(language: str = "python", **fields: Any) -> str:
        answer = client.post("/api/sessions", json={"language": language, **fields})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    return make


@pytest.fixture
def run(client: httpx.Client) -> Run:
    """Runs code in a session; the answer is that of the API, which must be a 200."""

    def run(session_id: str, code: str | None = None, **fields: Any) -> dict[str, Any]:
        body = fields if code is None else {"code": code, **fields}
        answer = client.post(f"/api/sessions/{session_id}/run", json=body)
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        return told

    return run
