"""`era cluster up` with engines of its own: PostgreSQL, S3 and Ray, begun, kept and ended with the command."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from era.client import cluster as command
from era.cluster import local, trial
from era.cluster.local import LocalCluster
from era.cluster.trial import ServerProcess
from era.errors import NotReady
from tests.client.command import era
from tests.cluster import Cluster, running, start
from tests.conftest import assert_nothing_left, descendants, eventually, is_running, mounts

RAY = Path(__file__).parent.parent.parent / ".tools" / "ray"
PROGRAM = "p = open('f', 'a+'); p.write('x'); p.seek(0); print(p.read())"


def needs(*names: str) -> None:
    """Skip the test where one of these isn't there, but not where nobody would notice."""
    for name in names:
        if not ((name == "ray" and RAY.is_dir()) or trial.is_there(name)):
            pytest.fail(trial.NEEDED[name]) if os.environ.get("CI") else pytest.skip(trial.NEEDED[name])


def run_through_each(cluster: Cluster, before: int) -> int:
    """Run the program at each host in turn; how often it has run in the session, which it had `before` times."""
    with cluster.clients() as clients:
        for client in clients:
            before += 1
            answer = client.post("/api/sessions/s/run", json={"code": PROGRAM})
            assert answer.status_code == 200, answer.text
            assert answer.json()["stdout"] == "x" * before + "\n"
    return before


def check_secrets(directory: Path, *files: str) -> None:
    """Nobody else can read these files, and nothing that they keep secret is in a log."""
    kept = [directory / file for file in files]
    assert [file.stat().st_mode & 0o777 for file in kept] == [0o600] * len(files)
    secret = []
    for file in kept:
        text = file.read_text()
        values = json.loads(text).values() if file.suffix else [text]
        secret += [value for value in values if isinstance(value, str)]
    logs = [*directory.rglob("*log"), *directory.rglob("*.log")]
    assert len(secret) >= len(files) < len(logs)
    for log in logs:
        if log.is_file():
            assert not any(value in log.read_text(errors="replace") for value in secret), log


def test_postgresql_and_s3_of_a_clusters_own(tmp_path: Path) -> None:
    needs("postgresql", "s3")
    directory, options = tmp_path / "cluster", ("--postgresql", "--s3")
    with running(directory, 2, *options) as cluster:
        with cluster.clients() as [client, _]:
            assert client.post("/api/sessions", json={"session_id": "s", "language": "python"}).status_code == 201
        count = run_through_each(cluster, 0)
        # The rows are behind the password, and the shared directory has neither rows nor content.
        keys = json.loads((directory / "postgresql" / "keys.json").read_text())
        url = f"postgresql://era:{{}}@127.0.0.1:{keys['port']}/era"
        with psycopg.connect(url.format(keys["password"])) as connection:
            assert connection.execute("SELECT count(*) FROM sessions").fetchone() == (1,)
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(url.format("wrong"))
        assert not (directory / "shared" / "era.sqlite").exists()
        assert not (directory / "shared" / "blobs").exists()
        said = (directory / "up.log").read_text()
        assert [line.split()[0] for line in said.splitlines()] == ["postgresql", "s3", "host-1", "host-2"]
    check_secrets(directory, "postgresql/keys.json", "s3/keys.json")

    with running(directory, 2, *options) as cluster:
        count = run_through_each(cluster, count)
        # An engine that ends is started anew.
        (server,) = [pid for pid in descendants(cluster.process.pid) if name_of(pid) == "radosgw"]
        os.kill(server, signal.SIGKILL)
        assert eventually(lambda: "s3 has ended and is started anew\n" in (directory / "up.log").read_text())
        assert eventually(lambda: (directory / "up.log").read_text().count("s3   127.0.0.1") == 2)
        run_through_each(cluster, count)


@pytest.mark.soak
def test_a_command_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    needs("postgresql")
    directory, before = tmp_path / "cluster", mounts()
    cluster = start(directory, 2, "--postgresql")
    with cluster.clients() as [client, _]:
        assert client.post("/api/sessions", json={"session_id": "s", "language": "python"}).status_code == 201
    count = run_through_each(cluster, 0)
    below = descendants(cluster.process.pid)
    cluster.process.kill()
    cluster.process.wait()
    for number in (1, 2):
        assert_nothing_left(before, below, directory / f"host-{number}")
    with running(directory, 2, "--postgresql") as cluster:
        run_through_each(cluster, count)


class FakeEngine:
    """An engine that does at each start what a test says, and notes that it was stopped."""

    def __init__(
        self,
        name: str,
        stopped: list[str],
        *starts: Callable[[], object],
        keeps_hosts: bool = False,
        ended: bool = False,
    ) -> None:
        self.name, self.keeps_hosts, self.has_ended = name, keeps_hosts, ended
        self._stopped, self._starts = stopped, list(starts)

    def start(self, environment: dict[str, str]) -> str:
        self.has_ended = bool(self._starts)
        if self._starts:
            self._starts.pop(0)()
        return "there"

    def stop(self) -> None:
        self._stopped.append(self.name)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Keeps this process's handlers of signals."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_process_that_does_not_start_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = ServerProcess("The engine", tmp_path / "log")
    for seconds, words in ((60.0, ["false"]), (0.1, ["sleep", "600"])):
        monkeypatch.setattr(trial, "_START_SECONDS", seconds)
        with pytest.raises(NotReady, match="The engine doesn't start"):
            process.start(words, lambda: False)
        assert process.has_ended, "so it is started again"


def test_engine_is_started_again_until_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(problem: Exception) -> Callable[[], object]:
        def start() -> None:
            raise problem

        return start

    problems = fails(NotReady("Its port is taken.")), fails(OSError("Its disk is full."))
    monkeypatch.setattr(local, "_AGAIN_SECONDS", 0.0)
    cluster = LocalCluster(tmp_path, [], [FakeEngine("s3", [], *problems, ended=True)], {}, 0)
    for _ in range(4):
        cluster._watch()
    said = capsys.readouterr()
    again = "s3 has ended and is started anew\n"
    assert said.err == f"{again}Its port is taken.\n{again}Its disk is full.\n{again}"
    assert said.out == "s3   there\n"


@pytest.mark.usefixtures("handlers")
def test_signal_breaks_off_start_of_engine(tmp_path: Path) -> None:
    def is_signalled() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        pytest.fail("it isn't broken off")

    stopped: list[str] = []
    engine = FakeEngine("ray", stopped, lambda: None, is_signalled, keeps_hosts=True)
    assert LocalCluster(tmp_path, [], [engine], {}, 0).run(60) == 0
    assert stopped == ["ray"]


@pytest.mark.usefixtures("handlers")
def test_hosts_left_by_ray_end_before_their_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[str] = []

    def end_hosts(_: Path) -> dict[str, int]:
        stopped.append("hosts")
        return {}

    monkeypatch.setattr(local, "end_hosts", end_hosts)
    engines = [
        FakeEngine("postgresql", stopped),
        FakeEngine("s3", stopped),
        FakeEngine("ray", stopped, keeps_hosts=True),
        FakeEngine("driver", stopped, lambda: os.kill(os.getpid(), signal.SIGTERM), keeps_hosts=True),
    ]
    assert LocalCluster(tmp_path, [], engines, {}, 0).run(60) == 0
    assert stopped == ["driver", "ray", "hosts", "s3", "postgresql"]


def test_a_node_of_ray_that_gives_up_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = f"""
import pathlib, time
tries = pathlib.Path({str(tmp_path / "tries")!r})
with tries.open("a") as file:
    file.write("x")
if len(tries.read_text()) < NEEDED:
    raise SystemExit("Ray gave up")
print("Ray runtime started", flush=True)
time.sleep(600)
"""
    monkeypatch.setattr(trial, "_RAY_NODE", program.replace("NEEDED", "2"))
    nodes = trial.RayNodes(tmp_path / "ray", [{}])
    nodes.start({})
    assert not nodes.has_ended
    nodes.stop()
    monkeypatch.setattr(trial, "_RAY_NODE", program.replace("NEEDED", "100"))
    with pytest.raises(NotReady, match="Ray gave up"):
        nodes.start({})
    nodes.stop()
    assert len((tmp_path / "tries").read_text()) == 2 + 3


@pytest.mark.soak
def test_all_engines(tmp_path: Path) -> None:
    """The first time hosts talk plain, then over TLS."""
    needs("postgresql", "s3", "ray")
    directory = tmp_path / "cluster"
    with running(directory, 2, "--full", PYTHONPATH=str(RAY)) as cluster:
        pids = [cluster.pid(number) for number in (0, 1)]
        assert all(map(is_running, pids))
        with cluster.clients() as [client, _]:
            assert client.post("/api/sessions", json={"session_id": "s", "language": "python"}).status_code == 201
        count = run_through_each(cluster, 0)
        assert "RAY_AUTH_MODE=token" in of_ray(cluster, "list", token="e" * 64, code=2)
    assert not any(map(is_running, pids))

    with running(directory, 2, "--full", "--tls", PYTHONPATH=str(RAY)) as cluster:
        count = run_through_each(cluster, count)
        with cluster.clients() as [client, _]:

            def ready() -> list[str]:
                hosts = client.get("/api/hosts").json()["hosts"]
                return [each["url"].split(":")[0] for each in hosts if each["status"] == "ready"]

            # On a busy machine a host may be silent for a moment.
            assert eventually(lambda: ready() == ["https"] * 2), ready()

        # One that is killed is started anew by its node, with its certificate.
        killed = cluster.pid(0)
        cluster.kill(0)
        assert eventually(lambda: cluster.pid(0) != killed and cluster.is_ready(0))
        count = run_through_each(cluster, count)

        # One that is drained gives its sessions away.
        nodes = {each["url"]: each["node"] for each in json.loads(of_ray(cluster, "list"))["hosts"]}
        url, other = (cluster.told()[number]["url"] for number in (0, 1))
        of_ray(cluster, "drain", nodes[url])
        assert not is_running(cluster.pid(0))
        with cluster.clients() as [_, client]:
            answer = client.post("/api/sessions/s/run", json={"code": PROGRAM})
            assert (answer.status_code, answer.json()["stdout"]) == (200, "x" * (count + 1) + "\n"), other
        of_ray(cluster, "start", nodes[url])
        assert eventually(lambda: cluster.is_ready(0))
        run_through_each(cluster, count + 1)
    check_secrets(directory, "postgresql/keys.json", "s3/keys.json", "ray/token")


def of_ray(cluster: Cluster, *words: str, token: str = "", code: int = 0) -> str:
    """What `era host` says of such a cluster's hosts, or complains of."""
    said = (cluster.directory / "up.log").read_text()
    address = re.findall(r"^ray   (\S+)$", said, re.MULTILINE)[-1]
    token = token or (cluster.directory / "ray" / "token").read_text()
    env = {**os.environ, "PYTHONPATH": str(RAY), "RAY_AUTH_TOKEN": token}
    done = era(None, "host", *words, "--cluster", address, "--json", code=code, env=env)
    return done.stderr if code else done.stdout


def test_what_cannot_be_had_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "cluster"

    def refused(*wanted: str, **variables: str) -> str:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            named = Namespace(
                dir=directory, hosts=2, port=0, tls=False, full=False, postgresql=False, s3=False, ray=False
            )
            vars(named).update(dict.fromkeys(wanted, True))
            with pytest.raises(NotReady) as raised:
                command.up(named)
        return raised.value.message

    with monkeypatch.context() as patch:
        patch.setattr(trial, "is_there", lambda _: False)
        assert refused("full") == (
            "What these options start isn't installed here. To install it: --postgresql: apt-get install postgresql; "
            "--s3: apt-get install radosgw; --ray: pip install 'era-sessions[server,cluster]'"
        )
    assert "era-sessions[server,cluster]" in era(None, "cluster", "up", "--ray", "--dir", directory, code=2).stderr
    for name in ("initdb", "setpriv"):
        (tmp_path / name).touch(mode=0o755)
    done = era(None, "cluster", "up", "--s3", "--dir", directory, code=2, env={"PATH": str(tmp_path)})
    assert "--s3: apt-get install radosgw\n" in done.stderr
    assert not directory.exists()

    with monkeypatch.context() as patch:
        patch.setattr(trial, "is_there", lambda _: True)
        assert "ERA_DATABASE_URL" in refused("postgresql", ERA_DATABASE_URL="postgresql://elsewhere/era")
        assert "ERA_BLOBS" in refused("s3", ERA_BLOBS="s3://elsewhere/era")
        assert "--postgresql" in refused("ray")
        # Of a cluster that was begun otherwise, sessions would be missing.
        (directory / "shared").mkdir(parents=True)
        assert "without --s3" in refused("s3")
        (directory / "postgresql").mkdir()
        (directory / "postgresql" / "keys.json").touch()
        assert "with --postgresql" in refused()
    assert sorted(path.name for path in directory.iterdir()) == ["postgresql", "shared"]


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


@pytest.mark.parametrize("name", ["postgresql", "s3"])
def test_listener_at_port_of_server_is_told_nothing(tmp_path: Path, name: str) -> None:
    keys = {"password": "canary", "access_key": "a", "secret_key": "canary"}
    (engine,) = trial.engines(tmp_path, {name}, [{}])
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.5)
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys.json").write_text(json.dumps({"port": other.getsockname()[1], **keys}))
        with pytest.raises(NotReady, match="is taken"):
            engine.start({})
        with other.accept()[0] as asked:
            assert asked.recv(100) == b""
        with pytest.raises(TimeoutError):
            other.accept()


def test_damaged_keys_are_told_and_nothing_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "keys.json").write_text("")
    with pytest.raises(NotReady, match=r"keys\.json is damaged"):
        trial.S3(tmp_path).start({})
    assert (tmp_path / "data").exists()
