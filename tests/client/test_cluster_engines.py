"""`era cluster up` with engines of its own: PostgreSQL, S3 and Ray, begun, kept and ended with the command."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import psycopg
import pytest

from era.client import cluster as command
from era.cluster import local
from era.cluster.engines import postgresql, ray_nodes, s3
from era.cluster.engines.process import ServerProcess
from era.cluster.local import Engine, LocalCluster
from era.errors import NotReady
from tests.client.command import era
from tests.cluster import Cluster, running, start
from tests.conftest import assert_nothing_left, descendants, eventually, is_running, mounts

RAY = Path(__file__).parent.parent.parent / ".tools" / "ray"
PROGRAM = "p = open('f', 'a+'); p.write('x'); p.seek(0); print(p.read())"


def needs(*missing: tuple[object, str]) -> None:
    """Skip the test where one of these isn't there, but not where nobody would notice."""
    for is_there, reason in missing:
        if not is_there:
            pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


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
    needs((postgresql.commands(), postgresql.MISSING), (s3.is_there(), s3.MISSING))
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
    needs((postgresql.commands(), postgresql.MISSING))
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


def test_an_engine_is_started_again_until_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process = ServerProcess("The engine", tmp_path / "log")
    with pytest.raises(NotReady, match="The engine doesn't start"):
        process.start(["false"], lambda: False, 60)
    assert process.has_ended, "so it is started again"
    with pytest.raises(NotReady):
        process.start(["sleep", "600"], lambda: False, 0.1)
    assert process.has_ended

    class Engine:
        """One that has ended, and starts at the third try."""

        name = "s3"
        keeps_hosts = False
        has_ended = True
        problems: ClassVar[list[Exception]] = [NotReady("Its port is taken."), OSError("Its disk is full.")]

        def start(self) -> str:
            if self.problems:
                raise self.problems.pop(0)
            self.has_ended = False
            return "there"

        def settings(self) -> dict[str, str]:
            return {}

        def stop(self) -> None: ...

    monkeypatch.setattr(local, "_AGAIN_SECONDS", 0.0)
    cluster = LocalCluster(tmp_path, [], [Engine()], {}, 0)
    for _ in range(4):
        cluster._watch()
    said = capsys.readouterr()
    again = "s3 has ended and is started anew\n"
    assert said.err == f"{again}Its port is taken.\n{again}Its disk is full.\n{again}"
    assert said.out == "s3   there\n"


def test_a_signal_breaks_off_the_start_of_an_engine(tmp_path: Path) -> None:
    class Engine:
        """One that ends, and then takes for ever to start."""

        name = "ray"
        keeps_hosts = True
        has_ended = False
        stopped = 0

        def start(self) -> str:
            if self.has_ended:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
                pytest.fail("it isn't broken off")
            self.has_ended = True
            return "there"

        def settings(self) -> dict[str, str]:
            return {}

        def stop(self) -> None:
            self.stopped += 1

    engine, kept = Engine(), {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert LocalCluster(tmp_path, [], [engine], {}, 0).run(60) == 0
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    assert engine.stopped == 1


def test_hosts_left_by_ray_end_before_their_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[str] = []

    class Engine:
        """One that has started, and is told to stop with the others."""

        has_ended = False

        def __init__(self, name: str, *, keeps_hosts: bool) -> None:
            self.name = name
            self.keeps_hosts = keeps_hosts

        def start(self) -> str:
            return "there"

        def settings(self) -> dict[str, str]:
            return {}

        def stop(self) -> None:
            stopped.append(self.name)

    class Last(Engine):
        def start(self) -> str:
            os.kill(os.getpid(), signal.SIGTERM)
            return "there"

    def end_hosts(_: Path) -> dict[str, int]:
        stopped.append("hosts")
        return {}

    monkeypatch.setattr(local, "end_hosts", end_hosts)
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    engines = [
        Engine("postgresql", keeps_hosts=False),
        Engine("s3", keeps_hosts=False),
        Engine("ray", keeps_hosts=True),
        Last("driver", keeps_hosts=True),
    ]
    try:
        assert LocalCluster(tmp_path, [], engines, {}, 0).run(60) == 0
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
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
    monkeypatch.setattr(ray_nodes, "_NODE", program.replace("NEEDED", "2"))
    nodes = ray_nodes.RayNodes(tmp_path / "ray", [{}])
    nodes.start()
    assert not nodes.has_ended
    nodes.stop()
    monkeypatch.setattr(ray_nodes, "_NODE", program.replace("NEEDED", "100"))
    with pytest.raises(NotReady, match="Ray gave up"):
        nodes.start()
    nodes.stop()
    assert len((tmp_path / "tries").read_text()) == 2 + 3


@pytest.mark.soak
def test_all_engines(tmp_path: Path) -> None:
    """The first time hosts talk plain, then over TLS."""
    needs((postgresql.commands(), postgresql.MISSING), (s3.is_there(), s3.MISSING), (RAY.is_dir(), ray_nodes.MISSING))
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
        patch.setattr(postgresql, "commands", lambda: None)
        patch.setattr(s3, "is_there", lambda: True)
        assert "apt-get install postgresql" in refused("full")
        patch.setattr(s3, "is_there", lambda: False)
        patch.setattr(ray_nodes, "is_there", lambda: False)
        assert refused("full") == (
            "--postgresql: there is no PostgreSQL here, --s3: there is no radosgw here, --ray: there is no Ray here. "
            "To get it: apt-get install postgresql radosgw && pip install 'era-sessions[server,cluster]'"
        )
    assert "era-sessions[server,cluster]" in era(None, "cluster", "up", "--ray", "--dir", directory, code=2).stderr
    for name in ("initdb", "setpriv"):
        (tmp_path / name).touch(mode=0o755)
    done = era(None, "cluster", "up", "--s3", "--dir", directory, code=2, env={"PATH": str(tmp_path)})
    assert done.stderr == "era: --s3: there is no radosgw here. To get it: apt-get install radosgw\n"
    assert not directory.exists()

    with monkeypatch.context() as patch:
        patch.setattr(postgresql, "commands", lambda: tmp_path)
        patch.setattr(s3, "is_there", lambda: True)
        patch.setattr(ray_nodes, "is_there", lambda: True)
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


@pytest.mark.parametrize(
    "make", [postgresql.PostgreSQL, lambda directory, _: s3.S3(directory)], ids=["postgresql", "s3"]
)
def test_whoever_has_a_server_s_port_is_told_nothing(tmp_path: Path, make: Callable[[Path, int], Engine]) -> None:
    keys = {"password": "canary", "access_key": "a", "secret_key": "canary"}
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.5)
        (tmp_path / "keys.json").write_text(json.dumps({"port": other.getsockname()[1], **keys}))
        with pytest.raises(NotReady, match="is taken"):
            make(tmp_path, 1).start()
        with other.accept()[0] as asked:
            assert asked.recv(100) == b""
        with pytest.raises(TimeoutError):
            other.accept()


def test_damaged_keys_are_told_and_nothing_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "keys.json").write_text("")
    with pytest.raises(NotReady, match=r"keys\.json is damaged"):
        s3.S3(tmp_path).start()
    assert (tmp_path / "data").exists()
