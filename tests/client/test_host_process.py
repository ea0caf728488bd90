"""A host's process on a node, and what it is told there. With Ray it is tested in tests/hostile/test_ray.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from era.cluster.host_process import (
    NOTE,
    HostProcess,
    HostStatus,
    began,
    host_environment,
    last_line,
    of_cluster,
    served_at,
    stop_seconds,
)
from era.cluster.ray_hosts import connect
from era.errors import NotReady
from tests.client.command import era
from tests.conftest import eventually, is_running
from tests.soaking import soak_the_rest

READY = textwrap.dedent(
    """
    import http.server, os, signal, sys
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/ready" else 404)
            self.end_headers()
            self.wfile.write(b'{"status": "ready", "sandboxes": {"places": 8, "taken": 3, "waiting": 2}}')
        def log_message(self, *_): pass
    server = http.server.HTTPServer(("127.0.0.1", int(os.environ["ERA_PORT"])), Handler)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    print(f"ERA serves   http://127.0.0.1:{server.server_port}   (and more)", flush=True)
    server.serve_forever()
    """
)
"""A server that begins, answers and ends as a host does, and is quick to start."""

CLUSTER = {
    "ERA_DATABASE_URL": "postgresql://era:pw@db/era",
    "ERA_SHARED_DIR": "/shared",
    "ERA_CLUSTER_SECRET": "s" * 32,
    "ERA_DATA_DIR": "/data",
}

type Make = Callable[..., HostProcess]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes watchers of one host, all of the same directory, and ends what they have started."""
    made: list[HostProcess] = []

    def make(program: str = READY) -> HostProcess:
        command = (sys.executable, "-S", "-c", program)
        made.append(HostProcess(tmp_path / "host", {**os.environ, "ERA_PORT": "0"}, command))
        return made[-1]

    yield make
    for host in made:
        pid = host.status().pid
        if pid and is_running(pid):
            os.kill(pid, signal.SIGKILL)


def until(host: HostProcess, state: str) -> HostStatus:
    """Look at a host until it is in this state."""

    def there() -> bool:
        host.look()
        return host.status().state == state

    assert eventually(there), host.status()
    return host.status()


def test_a_host_is_started_started_anew_and_stopped(make: Make) -> None:
    host = make()
    first = until(host, "ready")
    assert is_running(first.pid)
    assert (first.places, first.taken) == (8, 5), "those who wait count"
    os.kill(first.pid, signal.SIGKILL)

    def anew() -> bool:
        host.look()
        return host.status().pid not in (0, first.pid)

    assert eventually(anew)
    again = until(host, "ready")
    assert (again.restarts, again.url) == (1, first.url), "it has the port that it had before"
    host.stop()
    assert host.status().state == "stopping"
    assert until(host, "stopped").pid == 0
    host.look()
    assert host.status().state == "stopped", "it stays so"
    assert not is_running(again.pid)


def test_another_watcher_adopts_what_runs(make: Make, tmp_path: Path) -> None:
    first = until(make(), "ready")
    adopted = HostProcess(tmp_path / "host")  # which knows no settings yet
    assert adopted.status() == HostStatus("unready", first.url, first.pid)
    assert until(adopted, "ready").pid == first.pid
    os.kill(first.pid, signal.SIGKILL)
    assert "settings" in until(adopted, "failing").detail
    assert until(make(), "ready").pid != first.pid


LOCKED = "import fcntl; lock = open('{}', 'a'); fcntl.flock(lock, fcntl.LOCK_EX)\n"
"""What a host does first with its data directory."""


@pytest.mark.parametrize("note", [None, "no JSON", '{"pid": 0, "later": 1}'], ids=["none", "no JSON", "no process"])
def test_another_watcher_finds_what_runs_without_a_note(make: Make, tmp_path: Path, note: str | None) -> None:
    program = LOCKED.format(tmp_path / "host" / "lock") + READY
    first = until(make(program), "ready")
    (tmp_path / "host" / NOTE).unlink()
    if note is not None:
        (tmp_path / "host" / NOTE).write_text(note)
    again = make(program)
    found = until(again, "ready")
    assert (found.pid, found.url) == (first.pid, first.url)
    again.stop()
    until(again, "stopped")
    assert not is_running(first.pid)


def test_what_was_adopted_has_its_time_to_answer(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the watcher had no host."""
    program = LOCKED.format(tmp_path / "host" / "lock") + READY
    monkeypatch.setattr("era.cluster.host_process._HEALTH_SECONDS", 0.2)
    watcher = make(program)
    watcher._answered_at -= 1000
    pid = until(make(program), "ready").pid
    watcher.look()
    os.kill(pid, signal.SIGSTOP)
    while not watcher.status().detail:
        watcher.look()
    os.kill(pid, signal.SIGCONT)
    assert until(watcher, "ready").pid == pid


def test_whoever_else_has_the_data_directory_is_left_alone(make: Make, tmp_path: Path) -> None:
    """A backup, say."""
    (tmp_path / "host").mkdir()
    program = LOCKED.format(tmp_path / "host" / "lock") + "print('locked', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as backup:
        assert backup.stdout is not None
        assert backup.stdout.readline() == b"locked\n"
        host = make()
        assert host.status().pid == 0
        host.stop()
        assert backup.poll() is None
        backup.communicate(b"\n")
    assert backup.returncode == 0


def test_a_note_of_a_later_version_is_read(make: Make, tmp_path: Path) -> None:
    first = until(make(), "ready")
    note = tmp_path / "host" / NOTE
    note.write_text(json.dumps({**json.loads(note.read_text()), "later": 1}))
    assert until(make(), "ready").pid == first.pid


def test_a_host_may_say_much_before_it_serves(make: Make) -> None:
    host = make("print('one of many lines\\n' * 20_000, flush=True)\n" + READY)
    assert until(host, "ready").url


def test_a_drained_host_stays_so_whoever_watches(make: Make) -> None:
    host = make()
    until(host, "ready")
    host.stop(drain=True)
    until(host, "drained")
    later = make()
    later.keep_running()
    later.look()
    assert later.status().state == "drained"
    later.start()
    until(later, "ready")


def test_a_host_that_does_not_start_says_why_and_is_tried_again_later(make: Make) -> None:
    host = make("import sys\nprint('some line')\nsys.exit('era: Port 8787 is in use.\\n     And what to do.')")
    told = until(host, "failing")
    assert told.detail == "it doesn't start: era: Port 8787 is in use."
    before = told.restarts
    for _ in range(3):
        host.look()
    assert host.status().restarts == before


def test_what_ignores_its_end_is_killed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("era.cluster.host_process._STOP_SECONDS", -20.0)  # what is left of the times to drain
    host = make(READY.replace("lambda *_: os._exit(0)", "signal.SIG_IGN"))
    pid = until(host, "ready").pid
    host.stop()
    until(host, "stopped")
    assert not is_running(pid)


@pytest.mark.parametrize("drain", [False, True])
def test_a_host_has_its_time_to_end_whoever_watches(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drain: bool
) -> None:
    """Ray may restart an actor, which isn't told the settings again, and is told once more that the host is to end."""
    monkeypatch.setenv("ERA_DRAIN_SECONDS", "300")
    host = make(READY.replace("lambda *_: os._exit(0)", "signal.SIG_IGN"))
    pid = until(host, "ready").pid
    until(later := HostProcess(tmp_path / "host"), "ready")
    later.stop(drain=drain)
    kill_at = later._kill_at
    assert kill_at is not None
    assert kill_at > time.monotonic() + 600, "that isn't the default"
    again = HostProcess(tmp_path / "host")
    assert again.status().state == "stopping", "so it isn't asked any more, nor taken to hang"
    again.stop()
    again.look()
    assert again._kill_at == kill_at
    assert is_running(pid)
    os.kill(pid, signal.SIGKILL)
    assert until(again, "drained" if drain else "stopped").pid == 0
    monkeypatch.undo()
    anew = make()
    anew.start()
    until(anew, "ready")
    anew.look()
    assert anew.status().state == "ready", "the new process isn't told to end"


def test_what_answers_nothing_is_killed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    host = make()
    pid = until(host, "ready").pid
    monkeypatch.setattr("era.cluster.host_process._HUNG_SECONDS", 0.0)
    monkeypatch.setattr("era.cluster.host_process._HEALTH_SECONDS", 0.2)
    os.kill(pid, signal.SIGSTOP)

    def killed() -> bool:
        host.look()
        return not is_running(pid)

    assert eventually(killed)
    monkeypatch.setattr("era.cluster.host_process._HUNG_SECONDS", 60.0)
    monkeypatch.setattr("era.cluster.host_process._HEALTH_SECONDS", 2.0)
    assert until(host, "ready").restarts == 1


def test_a_process_with_the_same_id_is_another_one(make: Make, tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / NOTE).write_text(f'{{"pid": {os.getpid()}, "begun": {began(os.getpid()) + 1}, "url": "x"}}')
    host = make()
    assert host.status().pid == 0
    host.stop()
    host.look()
    (tmp_path / "host" / NOTE).write_text("no JSON")
    assert make().status() == HostStatus("starting")


def test_how_long_a_host_may_take_to_end() -> None:
    assert stop_seconds({}) == stop_seconds({"ERA_DRAIN_SECONDS": "x"}) == 95
    assert stop_seconds({"ERA_DRAIN_SECONDS": "300", "ERA_UNREADY_SECONDS": "5"}) == 680


@pytest.mark.parametrize(
    ("said", "url"),
    [("ERA serves   http://h:1   (x)\n", "http://h:1"), ("ERA serves   http://h:1", ""), ("warning\n", ""), ("", "")],
)
def test_where_it_serves(said: str, url: str) -> None:
    assert served_at(said) == url


def test_the_line_that_says_why() -> None:
    assert last_line("") == "it said nothing"
    assert last_line("era: a warning\nlog\nera: why not\n     a hint") == "era: why not"
    assert last_line("Error\n  at the end\n") == "at the end"


def test_a_node_s_own_settings_go_before_the_cluster_s() -> None:
    cluster = of_cluster({**CLUSTER, "AWS_REGION": "x", "PATH": "/driver", "RAY_AUTH_TOKEN": "t"})
    assert cluster == {**CLUSTER, "AWS_REGION": "x"}
    node = {"PATH": "/node", "ERA_DATA_DIR": "/disk", "RAY_AUTH_TOKEN": "t"}
    assert host_environment(cluster, node, "10.0.0.7") == {
        **CLUSTER,
        "AWS_REGION": "x",
        "PATH": "/node",
        "ERA_DATA_DIR": "/disk",
        "ERA_HOST": "10.0.0.7",
        "ERA_PORT": "8787",
    }
    everywhere = host_environment(cluster | {"ERA_HOST": "0.0.0.0", "ERA_PORT": "80"}, {}, "10.0.0.7")
    assert everywhere["ERA_HOST_URL"] == "http://10.0.0.7:80"
    assert host_environment(cluster | {"ERA_HOST": "::"}, {}, "fd::7")["ERA_HOST_URL"] == "http://[fd::7]:8787"


@pytest.mark.parametrize("name", sorted(CLUSTER))
def test_what_a_host_must_be_told(name: str) -> None:
    with pytest.raises(NotReady, match=name):
        host_environment({**CLUSTER, name: ""}, {}, "10.0.0.7")


@pytest.mark.parametrize("name", ["ERA_DATA_DIR", "ERA_SHARED_DIR"])
def test_a_directory_that_depends_on_where_it_is_named(name: str) -> None:
    with pytest.raises(NotReady, match="absolute"):
        host_environment({**CLUSTER, name: "data"}, {}, "10.0.0.7")


@pytest.mark.parametrize(
    ("address", "said"),
    [("127.0.0.1:1", "Ray at 127.0.0.1:1 can't be reached"), ("nowhere", "must be HOST:PORT of Ray's head, or auto")],
)
def test_a_cluster_that_cannot_be_reached(address: str, said: str) -> None:
    with pytest.raises(NotReady, match=said):
        connect(address)


def test_what_the_command_says_of_that() -> None:
    done = era(None, "host", "list", "--cluster", "127.0.0.1:1", code=2)
    assert done.stderr.startswith("era: Ray at 127.0.0.1:1 can't be reached")


TOGETHER = {
    "--cluster 127.0.0.1:2 --min-hosts 3 --max-hosts 2": "no less",
    "--cluster 127.0.0.1:2 --min-hosts 2": "for --max-hosts",
    "--keep-hosts": "are for --cluster",
}


@pytest.mark.parametrize("options", soak_the_rest(TOGETHER, 1))
def test_options_that_do_not_go_together(options: str) -> None:
    assert TOGETHER[options] in era(None, "serve", *options.split(), code=2).stderr


def test_a_database_that_cannot_be_used_is_told_without_its_password() -> None:
    url = "postgresql://era:hidden@127.0.0.1:1/era"
    done = era(None, "serve", "--cluster", "127.0.0.1:2", code=2, env={"ERA_DATABASE_URL": url})
    assert "postgresql://127.0.0.1:1/era can't be used" in done.stderr
    assert "hidden" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_host_that_was_drained_and_not_told_so_ends(make: Make, tmp_path: Path) -> None:
    """Whoever drained it died in between."""
    pid = until(make(), "ready").pid
    note = tmp_path / "host" / NOTE
    note.write_text(json.dumps({**json.loads(note.read_text()), "drained": True}))
    assert until(HostProcess(tmp_path / "host"), "drained").pid == 0
    assert not is_running(pid)
