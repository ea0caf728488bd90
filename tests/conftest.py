"""Real servers for the tests, and the check that they leave nothing behind."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import httpx
import pytest

from era import languages
from era.cluster.trial import free_port as free_port
from era.drivers.cgroups import cgroup_name
from tests.postgres import empty_postgres_url, postgres, postgres_url
from tests.preloaded import Forked, Preloaded

__all__ = ["empty_postgres_url", "postgres", "postgres_url"]

ERA = Path(sys.executable).parent / "era"
SERVE = [str(ERA), "serve"]
START_SECONDS = STOP_SECONDS = 240.0  # beside four busy programs a start has taken 60


THROUGH_ANOTHER_HOST = "--through-another-host"
OWN_DRIVER = "--driver"

LONG = (
    "sdk/test_typescript.py",
    "hostile/test_model.py",
    "hostile/test_neighbours.py",
    "hostile/test_fuzz.py",
    "hostile/test_failpoints.py",
    "api/test_two_hosts.py",
    "packages/test_builds.py",
    "hostile/test_dead_peers.py",
    "client/test_start.py",
    "hostile/test_half_open.py",
    "hostile/test_power_loss.py",
    "test_generated_clients.py",
    "hostile/test_overlooked.py",
    "api/test_dashboard_jobs.py",
    "hostile/test_lease.py",
    "hostile/test_full_host.py",
    "client/test_cluster_engines.py",
    "hostile/test_large_commits.py",
    "hostile/test_host_tls.py",
    "hostile/test_garbage_of_hosts.py",
    "api/test_dashboard_pdf.py",
    "adapters/test_apart.py",
    "api/test_last_values.py",
    "test_package.py",
    "api/test_dashboard_service.py",
    "api/test_waking.py",
    "api/test_early_collections.py",
    "hostile/test_service_on_s3.py",
    "api/test_ready.py",
    "hostile/test_cluster_faults.py",
    "store/test_owned_totals.py",
    "network/test_slices.py",
    "api/test_capacity.py",
    "hostile/test_crash.py",
    "api/test_builds.py",
    "api/test_dashboard_hostile.py",
    "api/test_dashboard_accessible.py",
    "api/test_dashboard_saving.py",
    "mcp/test_long_output.py",
    "mcp/test_conformance.py",
    "api/test_real_projects.py",
)
"""Files of few tests that take more than half a minute. They begin first: no worker is left with one at the end."""


OF_CLUSTERS = ("test_cluster.py", "test_two_hosts.py")
"""Files of the API's tests that are about several hosts as it is."""


def pytest_addoption(parser: pytest.Parser) -> None:
    shown = "reach servers through a host of their cluster that isn't their sessions' home"
    parser.addoption(THROUGH_ANOTHER_HOST, action="store_true", help=shown)
    parser.addoption(OWN_DRIVER, metavar="MODULE:CLASS", help="the driver that tests/drivers/conformance checks")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put files into the order in which workers are to begin them (scripts/test): long ones, then those of many tests.
    With the option, skip the tests for which it makes no difference, and say why."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONG)}
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (ranks.get(item.path, len(ranks)), -counts[item.path], item.path))
    if config.getoption(THROUGH_ANOTHER_HOST):
        for item in items:
            if "kind_of_server" not in getattr(item, "fixturenames", ()):
                why = "it makes a cluster itself" if item.path.name in OF_CLUSTERS else "it calls no sound server"
            elif of_one := item.get_closest_marker("one_host"):
                why = of_one.args[0]
            else:
                continue
            item.add_marker(pytest.mark.skip(reason=f"not through another host: {why}"))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Have each worker begin to import elsewhere in a directory. After a fresh checkout nothing is compiled yet, and
    workers that went the same way would each compile everything."""
    report = yield
    if isinstance(collector, pytest.Directory):
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        first = len(report.result) * worker // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        report.result = report.result[first:] + report.result[:first]
    return report


def pytest_configure() -> None:
    """Give the tests a mount namespace of their own. They compare what is mounted before and after, so they must not
    see the mounts of tests and other programs that run beside them."""
    if os.geteuid() == 0:
        os.unshare(os.CLONE_NEWNS)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def pytest_collection_finish() -> None:
    """What is collected lasts as long as the tests, and need not be looked through for garbage again and again."""
    gc.collect()
    gc.freeze()


type Process = subprocess.Popen[bytes] | Forked


@cache
def preloaded() -> Preloaded:
    """What servers and other commands are forked from."""
    return Preloaded()


@dataclass
class Server:
    """A service of its own process, with a data directory that outlives it."""

    data_dir: Path
    settings: dict[str, str] = field(default_factory=dict)
    uid: int | None = None
    """Serve as this ordinary user. Needs root."""

    hidden: str | None = None
    """A file of the machine that the service finds empty. Needs root."""

    weakness: str = ""
    """Python statements that take something out of the service, or change it, before it starts."""

    start_seconds: float = START_SECONDS
    process: Process | None = None
    url: str = ""
    """Where tests call it."""

    own_url: str = ""
    """Where it listens itself; the same, unless it is called through another host."""

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def content_dir(self) -> Path:
        """Where its rows and blobs are."""
        return self.data_dir

    @property
    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    @property
    def log_of_calls(self) -> str:
        """The log of the host that is called, which has a line for each request."""
        return self.log

    @property
    def _log_path(self) -> Path:
        return self.data_dir.parent / f"{self.data_dir.name}.log"

    def start(self) -> Server:
        """Start the service and wait until it serves."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ERA_")}
        # The strongest isolation of this machine may be slower, and isn't the same everywhere.
        # Most tests make fewer sandboxes than would be kept ready.
        environment |= {"ERA_ISOLATION": "bubblewrap", "ERA_SPARES": "0"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # or each start would compile again
        environment |= {"ERA_PORT": "0", "ERA_DATA_DIR": str(self.data_dir), **self.settings}
        command = SERVE
        if self.uid is not None:
            command, extra = self._as_ordinary_user(self.uid)
            environment |= extra
        with self._log_path.open("ab") as log:
            start = log.tell()
            self.process = self._spawn(command, environment, log)
        deadline = time.monotonic() + self.start_seconds
        while not (match := re.search(r"ERA serves\s+(http://\S+)", self.log[start:])):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"The server did not start:\n{self.log[start:]}")
            time.sleep(0.02)
        self.url = self.own_url = match[1]
        return self

    def _spawn(self, command: list[str], environment: dict[str, str], log: IO[bytes]) -> Process:
        if command == SERVE and "PYTHONPATH" not in environment:  # with that, there is something else to import
            streams = 0, log.fileno(), log.fileno()
            return preloaded().start(command[1:], environment, streams, before=self._before())
        assert not self.weakness, "only a service that is forked executes that"
        assert self.hidden is None, "the same"
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def _before(self) -> str:
        """The Python statements that a forked service executes before it starts."""
        return (mounting("/dev/null", self.hidden) if self.hidden is not None else "") + self.weakness

    def _as_ordinary_user(self, uid: int) -> tuple[list[str], dict[str, str]]:
        """The command that serves as `uid`, and its additional environment. A mount namespace shows that user the
        project and the data directory outside of the directories that are closed to it."""
        self.data_dir.mkdir(exist_ok=True)
        os.chown(self.data_dir, uid, uid)
        project = Path(__file__).parent.parent
        shown = {project: "/mnt/project", self.data_dir: "/mnt/data"}
        extra = {"PYTHONPATH": "/mnt/project/src", "ERA_DATA_DIR": "/mnt/data", "HOME": "/mnt"}
        if "ERA_SHARED_DIR" in self.settings:
            shared = Path(self.settings["ERA_SHARED_DIR"])
            shared.mkdir(exist_ok=True)
            os.chown(shared, uid, uid)
            shown[shared] = extra["ERA_SHARED_DIR"] = "/mnt/shared"
        binds = "".join(f"mkdir {there} && mount --bind '{here}' {there} && " for here, there in shown.items())
        script = (
            f"mount -t tmpfs none /mnt && {binds} cd / "
            f"&& exec setpriv --reuid {uid} --regid {uid} --clear-groups "
            "/mnt/project/.venv/bin/python -m era.client.cli serve"
        )
        command = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script]
        return command, extra

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send the service a signal and wait for its end; returns its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(STOP_SECONDS)
        self.process = None
        return code

    def client(self, **options: Any) -> httpx.Client:
        # Plain HTTP: reading the machine's certificates would take longer than most requests.
        defaults: dict[str, Any] = {"base_url": self.url, "timeout": 300}
        return httpx.Client(trust_env=False, verify=False, **defaults | options)

    def exchange(self, request: bytes) -> bytes:
        """Send bytes as they are; returns all that comes until the service hangs up. SELF in them becomes its host and
        port."""
        host = self.url.removeprefix("http://")
        name, _, port = host.rpartition(":")
        received = b""
        with socket.create_connection((name, int(port)), timeout=60) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(request.replace(b"SELF", host.encode()))
            with contextlib.suppress(ConnectionError):
                while piece := connection.recv(1 << 16):
                    received += piece
        return received

    def descendants(self) -> list[int]:
        return descendants(self.pid)

    @property
    def resident_bytes(self) -> int:
        """Memory of the service itself, without its children."""
        return self._memory("VmRSS")

    @property
    def peak_resident_bytes(self) -> int:
        """The most memory of the service itself since its start or `reset_peak`."""
        return self._memory("VmHWM")

    def reset_peak(self) -> int:
        """Measure the peak anew from here; returns the memory resident now."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")
        return self.resident_bytes

    def _memory(self, field: str) -> int:
        match = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert match
        return int(match[1]) << 10


def mounting(source: str | Path, target: str) -> str:
    """Python statements that put one file in the place of another for the process that executes them."""
    return (
        "import os, subprocess; os.unshare(os.CLONE_NEWNS); "
        "subprocess.run(['mount', '--make-rslave', '/'], check=True); "
        f"subprocess.run(['mount', '--bind', {str(source)!r}, {target!r}], check=True)\n"
    )


def built_with(part: str, **values: object) -> str:
    """Python statements that have the service build a part with other values than its constants. `part` is the name by
    which the module that builds it has it, such as `era.parts.Turns`."""
    module = part.rpartition(".")[0]
    return f"import functools, {module}\n{part} = functools.partial({part}, **{values!r})\n"


def descendants(pid: int) -> list[int]:
    """The processes below `pid`, however deep."""
    all_below, pending = [], [pid]
    while pending:
        below = _children(pending.pop())
        all_below += below
        pending += below
    return all_below


def _children(pid: int) -> list[int]:
    found = list[int]()
    with contextlib.suppress(OSError):  # it has ended, or one of its threads
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", "rb") as children:
                found += map(int, children.read().split())
    return found


def is_running(pid: int) -> bool:
    """Whether there is such a process, other than a zombie that its parent hasn't waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def cgroups(name: str) -> list[str]:
    """Control groups of sandboxes below the group `name`."""
    return [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/{name}/sb-*")]


def mounts() -> list[str]:
    return Path("/proc/self/mounts").read_text().splitlines()


def eventually(probe: Callable[[], Any], seconds: float = 240.0) -> Any:
    """Call `probe` until its result is truthy, or for so many seconds; returns its last result.

    The default is long because machines may be busy: it only bounds how long a test that fails takes.
    """
    deadline = time.monotonic() + seconds
    while not (result := probe()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return result


def metrics_now(client: httpx.Client) -> str:
    """Read the metrics as of now: what the first call answers may be a second old, and counts no call of /metrics
    since then."""
    first = client.get("/metrics").text

    def text() -> str | None:
        text = client.get("/metrics").text
        return None if text == first else text

    return str(eventually(text))


def opened(target: str | Path) -> int:
    """How many descriptors of this process lead to `target`, which is a directory with all below it, whether that still
    has names or not, or a kind such as anon_inode:inotify. Others may be closed at any time, by threads of tests that
    are over."""
    links = list[str]()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            links.append(os.readlink(f"/proc/self/fd/{entry}"))
    return sum(f"{link}/".startswith(f"{target}/") for link in links)


def at_best(below: float, seconds: Callable[[], float], tries: int = 20) -> float:
    """Take a time until it is below so many seconds; the least that was taken. What a busy machine delays now and then
    passes, and what takes longer by itself never does."""
    least = seconds()
    for _ in range(tries):
        if least < below:
            break
        least = min(least, seconds())
    return least


def assert_nothing_left(before_mounts: list[str], processes: list[int], data_dir: Path, group: str = "") -> None:
    """Assert that a server that has ended left no process, mount, cgroup or sandbox directory."""
    eventually(lambda: not any(map(is_running, processes)))
    assert [pid for pid in processes if is_running(pid)] == []
    assert mounts() == before_mounts
    live = data_dir / "live"
    assert not live.exists() or not list(live.iterdir())
    assert cgroups(group or cgroup_name(data_dir)) == []


@pytest.fixture(scope="session")
def kind_of_server(pytestconfig: pytest.Config) -> type[Server]:
    """What servers are: each alone, or reached through another host of its cluster."""
    if pytestconfig.getoption(THROUGH_ANOTHER_HOST):
        from tests.two_hosts import Home

        return Home
    return Server


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory, kind_of_server: type[Server]) -> Iterator[Server]:
    """One server for all tests that only need a server. At the end nothing of it may be left."""
    before = mounts()
    data_dir = tmp_path_factory.mktemp("shared") / "data"
    server = kind_of_server(data_dir, {"ERA_SPARES": "1"}).start()
    yield server
    processes = server.descendants()
    assert server.stop() == 0, server.log
    assert_nothing_left(before, processes, data_dir)
    assert "Traceback" not in server.log, server.log


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """The shared server, with a leak check after the test: sessions are deleted, and all that they held must go."""
    assert eventually(lambda: _at_rest(shared_server)), "the server was not at rest before the test"
    fds, processes = held(shared_server)
    opened_before = descriptor_kinds(shared_server)
    yield shared_server
    with shared_server.client() as client:
        assert client.delete("/api/sessions").status_code == 200
        for kind, namespace in {(each["type"], each["namespace"]) for each in _resources(client)}:
            assert client.delete(f"/api/storage/{kind}/{quote(namespace, safe='')}").status_code == 200
    assert eventually(lambda: _at_rest(shared_server)), "sandboxes were left behind"
    after = held(shared_server)
    if after[0] > fds + 4 or after[1] > processes:  # perhaps for a moment only
        assert eventually(lambda: held(shared_server)[1] <= processes), "processes were left behind"
        assert eventually(lambda: held(shared_server)[0] <= fds + 4), (
            f"descriptors were left open: {descriptor_kinds(shared_server) - opened_before}"
        )
    kept = len(languages.runtimes())  # one of each that is ready
    assert eventually(lambda: len(list((shared_server.data_dir / "live").glob("sb-*"))) == kept), (
        "directories were left"
    )


DATABASE_FDS = 2 * 5 + 1
"""Descriptors of SQLite: a file and a log of one writer and four readers, and their shared memory."""


def held(server: Server) -> tuple[int, int]:
    """How many descriptors the server has, and how many processes there are in sandboxes: without its templates, of
    which there is another one now and then, while the one before lives as long as its sandboxes do. Those are two
    processes each, and whatever is in a sandbox is below such two. Descriptors of the database count only beyond those
    of its pool, which opens connections when several readers coincide, and keeps them."""
    templates = len(list((server.data_dir / "live").glob("template-*")))
    pids = server.descendants()
    outermost = [pid for pid in pids if _parent(pid) == server.pid]
    second = [pid for pid in pids if _parent(pid) in outermost]
    database = str(server.data_dir / "era.sqlite")
    kinds = descriptor_kinds(server)
    of_database = sum(count for kind, count in kinds.items() if kind.startswith(database))
    fds = kinds.total() - min(of_database, DATABASE_FDS)
    return fds - 2 * templates, len(pids) - len(outermost) - len(second)


def descriptor_kinds(server: Server) -> Counter[str]:
    """Count the server's descriptors by what they lead to: a path, or a kind such as `socket` or `anon_inode`."""
    kinds = Counter[str]()
    for entry in Path(f"/proc/{server.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            kinds[re.sub(r":\[\d+\]$", "", os.readlink(entry))] += 1
    return kinds


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None  # it has ended


def _resources(client: httpx.Client) -> list[dict[str, str]]:
    """What is in the storage."""
    resources: list[dict[str, str]] = client.get("/api/resources/list", params={"limit": 1000}).json()["resources"]
    return resources


def _at_rest(server: Server) -> bool:
    """Whether no sandbox is warm or busy, and one of each runtime is ready."""
    with server.client(base_url=server.own_url) as client:
        sandboxes = client.get("/health").json()["sandboxes"]
    return bool(sandboxes == {"live": 0, "busy": 0, "ready": len(languages.runtimes())})


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture
def at_home(server: Server) -> Iterator[httpx.Client]:
    """A client of the host that does what is asked for: of health and metrics each host tells its own."""
    with server.client(base_url=server.own_url) as client:
        yield client


@pytest.fixture
def own_server(tmp_path: Path, kind_of_server: type[Server]) -> Iterator[MakeServer]:
    """Makes servers of the test's own, which may be killed and started again on their data.

    Settings are keywords: `own_server(max_warm="2")` sets ERA_MAX_WARM.
    """
    before = mounts()
    servers: list[Server] = []

    def make(uid: int | None = None, hidden: str | None = None, weakness: str = "", **settings: str) -> Server:
        name = f"data{len(servers)}"
        values = {f"ERA_{key.upper()}": value for key, value in settings.items()}
        server = kind_of_server(tmp_path / name, values, uid, hidden, weakness)
        servers.append(server)
        return server.start()

    yield make
    for server in servers:
        processes = server.descendants() if server.process else []
        if server.process is not None:
            server.stop()
        assert_nothing_left(before, processes, server.data_dir)


type Run = Callable[..., dict[str, Any]]
type MakeServer = Callable[..., Server]
type MakeSession = Callable[..., str]


@pytest.fixture
def session(client: httpx.Client) -> MakeSession:
    """Makes a session; returns its id."""

    def make(language: str = "python", **fields: Any) -> str:
        answer = client.post("/api/sessions", json={"language": language, **fields})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    return make


@pytest.fixture
def run(client: httpx.Client) -> Run:
    """Runs code in a session; returns the body of the API's answer, which must be a 200."""

    def run(session_id: str, code: str | None = None, **fields: Any) -> dict[str, Any]:
        body = fields if code is None else {"code": code, **fields}
        answer = client.post(f"/api/sessions/{session_id}/run", json=body)
        assert answer.status_code == 200, answer.text
        outcome: dict[str, Any] = answer.json()
        return outcome

    return run
