"""What is sent twice, and what isn't: the calls that may have been done, and the bodies that can't be read again."""

from __future__ import annotations

import io
import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pytest

import era
from era import AsyncEra, Era
from era.sdk.blocking import Transport
from tests.client.command import era as command
from tests.sdk.cutter import Cutter
from tests.sdk.scripted import Script, ScriptedServer, refusal, serving

INFO: Script = (200, {}, b'{"id": "x", "language": "python", "default_timeout": 30}')
RUN: Script = (200, {}, b'{"run_id": "run_1", "status": "ok"}')
PUT: Script = (200, {}, b'{"path": "a"}')
LATER = refusal(503, "too_many_uploads", **{"Retry-After": "0"})
LOST = refusal(503, "home_lost")
LOST_AS_IT_WAS = refusal(503, "home_lost", **{"Retry-After": "0"})
UNKNOWN = refusal(503, "outcome_unknown")


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    with serving() as server:
        yield server


@pytest.mark.parametrize("lost", [LOST, LOST_AS_IT_WAS, UNKNOWN])
async def test_a_call_that_a_lost_home_may_have_done_is_not_made_again(scripted: ScriptedServer, lost: Script) -> None:
    expected = era.errors.OutcomeUnknown if lost is UNKNOWN else era.errors.HomeLost
    scripted.script = [lost, PUT, lost, PUT]
    with Era(scripted.url, idempotency_keys=False) as client, pytest.raises(expected):
        client.sessions.named("x").run("1")
    assert len(scripted.seen) == 1
    scripted.script = [lost, PUT]
    async with AsyncEra(scripted.url) as waiting:
        with pytest.raises(expected):
            await waiting.sessions.named("x").files.move("a", "b")
    assert len(scripted.seen) == 2


@pytest.mark.parametrize("lost", [LOST, LOST_AS_IT_WAS, UNKNOWN])
async def test_a_call_that_only_reads_or_has_a_key_is_made_again(scripted: ScriptedServer, lost: Script) -> None:
    scripted.script = [lost, INFO, lost, RUN, lost, INFO, lost, RUN]
    with Era(scripted.url) as client:
        assert client.sessions.get("x").run("1").run_id == "run_1"
    async with AsyncEra(scripted.url) as waiting:
        assert (await (await waiting.sessions.get("x")).run("1")).run_id == "run_1"
    for first, second in ((2, 3), (6, 7)):
        one, other = (scripted.seen[number][2] for number in (first, second))
        assert one.get("Idempotency-Key", one.get("idempotency-key"))
        assert one == other


def test_a_proxy_without_an_answer_of_the_server_is_asked_again(scripted: ScriptedServer) -> None:
    """Where nothing is done twice."""
    away: list[Script] = [(status, {}, b"<html>") for status in (502, 503, 504)]
    scripted.script = [*away, RUN, *away[:1], INFO, (500, {}, b"<html>"), INFO]
    with Era(scripted.url) as client:
        session = client.sessions.named("x")
        assert session.run("1").run_id == "run_1"
        with pytest.raises(era.NotEra):
            session.files.move("a", "b")
        assert session.info().id == "x"
        with pytest.raises(era.NotEra):
            session.info()
    assert len(scripted.seen) == 7


def test_a_change_that_waits_for_a_run_may_take_as_long_as_the_server_waits(
    scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A minute for files, of which the server then says why, and for all others until the run has ended."""
    asked: list[tuple[str, float]] = []
    opened = Transport.open

    def noting(self: Transport, call: era.sdk.calls.Call, seconds: float) -> Any:
        asked.append((f"{call.method} {call.path.removeprefix('/api/sessions/x')}", seconds))
        return opened(self, call, seconds)

    monkeypatch.setattr(Transport, "open", noting)
    (tmp_path / "f").write_text("x")
    nothing: Script = (200, {}, b"{}")
    changed: Script = (200, {}, b'{"metadata": {"default_timeout": 30}}')
    scripted.script = [*[nothing] * 6, (200, {}, b'{"files": []}'), nothing, nothing, *[changed] * 3, *[RUN] * 5]
    with Era(scripted.url, timeout=7) as client:
        session = client.sessions.named("x")
        files = session.files
        files.write("a", b"")
        files.remove("a")
        files.move("a", "b")
        files.mkdir("c")
        files.extract(b"")
        session.checkpoint()
        files.push(tmp_path)
        session.data.replace({})
        session.update(data={})
        session.update(setup=None)
        session.update(ttl=60)
        session.rollback(1)
        session.run("1", background=True)
        session.set_up_again()
        session.stop()
        session.run("1", timeout=5)
    minute, long = 7 + 60, 7 + 86_400
    assert asked == [
        ("PUT /files/a", minute),
        ("DELETE /files/a", minute),
        ("POST /move", minute),
        ("POST /mkdir", minute),
        ("PUT /archive", minute),
        ("POST /checkpoint", minute),
        ("GET /files", 7),
        ("PUT /archive", minute),
        ("PATCH ", long),
        ("PATCH ", long),
        ("PATCH ", long),
        ("PATCH ", 7),
        ("POST /rollback", long),
        ("POST /run", long),
        ("POST /setup", long),
        ("POST /stop", long),
        ("POST /run", 7 + 2 * 5),  # it may wait for the setup as long as it may take
    ]


def test_a_run_is_asked_for_again_while_its_first_attempt_is_under_way(scripted: ScriptedServer) -> None:
    under_way = refusal(409, "run_under_way")
    scripted.script = [UNKNOWN, under_way, RUN, under_way]
    with Era(scripted.url) as client:
        session = client.sessions.named("x")
        assert session.run("1").run_id == "run_1"
        with pytest.raises(era.errors.RunUnderWay):
            session.run("1")


async def test_who_waits_for_a_run_waits_for_a_server_that_restarts(scripted: ScriptedServer) -> None:
    """Once it has been there, and unless nothing is to be tried again."""
    running: Script = (200, {}, b'{"run_id": "run_1", "status": "running"}')
    away: list[Script] = [(502, {}, b"<html>")] * 4
    starting = refusal(503, "not_ready")
    scripted.script = [running, *away, starting, RUN] * 2
    with Era(scripted.url, retries=1) as client:
        assert client.sessions.named("x").runs.get("run_1").wait().status == "ok"
        async with AsyncEra(scripted.url, retries=1) as waiting:
            assert (await waiting.sessions.named("x").runs.get("run_1").wait()).status == "ok"
    scripted.script = [*away, RUN]
    with Era(scripted.url, retries=1) as client, pytest.raises(era.NotEra):
        client.sessions.named("x").runs.get("run_1").wait()
    scripted.script = [running, *away]
    with Era(scripted.url, retries=0) as client, pytest.raises(era.NotEra):
        client.sessions.named("x").runs.get("run_1").wait()


def test_standard_input_is_not_sent_twice(scripted: ScriptedServer) -> None:
    scripted.script = [LATER, PUT]
    command(None, "files", "write", "app", "when.txt", stdin="now", env={"ERA_SERVER": scripted.url}, code=2)
    assert scripted.bodies == [b"now"]


@contextmanager
def piped(content: bytes) -> Iterator[IO[bytes]]:
    """A pipe from which this can be read, once."""
    end, other = os.pipe()
    os.write(other, content)
    os.close(other)
    with open(end, "rb") as file:
        yield file


async def test_a_pipe_is_not_sent_twice(scripted: ScriptedServer) -> None:
    scripted.script = [LATER, PUT]
    with Era(scripted.url) as client, piped(b"one") as file, pytest.raises(era.Unavailable):
        client.sessions.named("x").files.write("a", file)
    scripted.script = [LATER, PUT]
    async with AsyncEra(scripted.url) as waiting:
        with piped(b"two") as file, pytest.raises(era.Unavailable):
            await waiting.sessions.named("x").files.write("a", file)
    assert scripted.bodies == [b"one", b"two"]


async def test_a_path_of_something_without_a_size_is_sent_whole(scripted: ScriptedServer, tmp_path: Path) -> None:
    pipe, empty, proc = tmp_path / "pipe", tmp_path / "empty", Path("/proc/version")
    os.mkfifo(pipe)
    empty.touch()
    scripted.script = [PUT] * 6
    for content in (b"one", b"two"):
        writer = threading.Thread(target=pipe.write_bytes, args=(content,))
        writer.start()
        if content == b"one":
            with Era(scripted.url) as client:
                for path in (pipe, proc, empty):
                    client.sessions.named("x").files.write("a", path)
        else:
            async with AsyncEra(scripted.url) as waiting:
                for path in (pipe, proc, empty):
                    await waiting.sessions.named("x").files.write("a", path)
        writer.join()
    assert scripted.bodies == [b"one", proc.read_bytes(), b"", b"two", proc.read_bytes(), b""]


async def test_a_file_is_sent_anew_from_where_it_began(scripted: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"content")
    told: list[int] = []
    scripted.script = [LATER, PUT] * 6
    with Era(scripted.url) as client:
        files = client.sessions.named("x").files
        files.write("a", tmp_path / "f", progress=told.append)
        in_memory = io.BytesIO(b"the content")
        in_memory.seek(4)
        files.write("a", in_memory)
        with (tmp_path / "f").open("rb") as file:
            files.write("a", file)
            assert not file.closed
    async with AsyncEra(scripted.url) as waiting:
        files_too = waiting.sessions.named("x").files
        await files_too.write("a", tmp_path / "f", progress=told.append)
        in_memory.seek(4)
        await files_too.write("a", in_memory)
        with (tmp_path / "f").open("rb") as file:
            await files_too.write("a", file)
    assert scripted.bodies == [b"content"] * 12
    assert told == [7, 7]  # nothing is told twice


async def test_a_body_that_was_not_begun_can_be_sent_later(tmp_path: Path) -> None:
    """Where nobody listens, nothing was read."""
    (tmp_path / "f").write_bytes(b"content")
    with ScriptedServer() as gone:
        url = gone.url
    with Era(url, retries=1) as client, pytest.raises(era.ServerAway):
        client.sessions.named("x").files.write("a", tmp_path / "f")
    async with AsyncEra(url, retries=1) as waiting:
        with pytest.raises(era.ServerAway):
            await waiting.sessions.named("x").files.write("a", tmp_path / "f")


def test_a_path_is_closed_once_it_is_sent_or_not(scripted: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"content")
    with Era(scripted.url) as client:
        files = client.sessions.named("x").files
        for script in ([PUT], [refusal(400, "bad")], [LATER] * 4):
            scripted.script = script
            bodies: list[era.sdk.calls.Body] = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(era.sdk.calls.Body, "close", _noting(bodies))
                try:
                    files.write("a", tmp_path / "f")
                except era.EraError:
                    assert script != [PUT]
            assert [body._file.closed for body in bodies] == [True]


def _noting(bodies: list[era.sdk.calls.Body]) -> object:
    close = era.sdk.calls.Body.close

    def noting(body: era.sdk.calls.Body) -> None:
        close(body)
        bodies.append(body)

    return noting


def test_connections_with_large_descriptors(scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """`select` takes none above 1023."""
    monkeypatch.setattr("tests.sdk.scripted._Handler.protocol_version", "HTTP/1.1")  # which keeps connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2000, hard), hard))
    taken = [os.open("/dev/null", os.O_RDONLY)]
    scripted.script = [(200, {}, b'{"status": "ok"}')] * 2
    try:
        while taken[-1] < 1100:
            taken.append(os.dup(taken[0]))
        with Era(scripted.url) as client:
            for _ in range(2):
                assert client.health() == {"status": "ok"}
                assert client._connection._transport._idle
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_that_was_forked_has_connections_of_its_own(
    scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.sdk.scripted._Handler.protocol_version", "HTTP/1.1")  # which keeps connections
    scripted.script = [(200, {}, b'{"status": "ok"}')] * 3
    with Cutter(scripted.url, lambda number, came: False) as way, Era(way.url) as client:
        client.health()
        assert client._connection._transport._idle
        if (child := os.fork()) == 0:
            status = 1
            with suppress(BaseException):
                status = client.health() != {"status": "ok"}
            os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert way.connections == 2
        client.health()


def test_a_download_leaves_other_files_alone(scripted: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "x.part").write_text("mine")
    scripted.script = [(200, {}, b"content")]
    with Era(scripted.url) as client:
        client.sessions.named("x").files.download("a", tmp_path / "x")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x": "content", "x.part": "mine"}


def test_downloads_to_one_target_do_not_mix(tmp_path: Path) -> None:
    from era.sdk.directories import replacing

    with replacing(tmp_path / "x", None) as one, replacing(tmp_path / "x", None) as other:
        one(b"one")
        other(b"the other")
        one(b" and one")
    assert (tmp_path / "x").read_text() == "one and one"
    assert os.listdir(tmp_path) == ["x"]
    with suppress(ZeroDivisionError), replacing(tmp_path / "x", None) as write:
        write(b"half")
        raise ZeroDivisionError
    assert (os.listdir(tmp_path), (tmp_path / "x").read_text()) == (["x"], "one and one")
    with pytest.raises(era.LocalError), replacing(tmp_path, None) as write:
        write(b"a directory is there")


@pytest.mark.parametrize(
    ("status", "code", "left_with"), [("lost", "null", 1), ("ok", "null", 0), ("ok", "0", 0), ("failed", "3", 3)]
)
def test_the_command_leaves_with_1_for_a_run_without_an_exit_code(
    scripted: ScriptedServer, status: str, code: str, left_with: int
) -> None:
    record = f'{{"run_id": "r", "status": "{status}", "exit_code": {code}, "state": {{"version": 1}}}}'
    scripted.script = [(200, {}, record.encode())]
    command(None, "runs", "wait", "x", "r", env={"ERA_SERVER": scripted.url}, code=left_with)


@pytest.mark.parametrize("words", [("logs", "-f", "x", "p"), ("shell", "x", "--process", "p")])
@pytest.mark.parametrize(("code", "left_with"), [("null", 1), ("0", 0), ("143", 143)])
def test_the_command_leaves_with_1_for_a_process_without_an_exit_code(
    scripted: ScriptedServer, words: tuple[str, ...], code: str, left_with: int
) -> None:
    event = f'data: {{"type": "exit", "exit_code": {code}, "signal": null, "reason": "Lost."}}\n\n'
    scripted.script = [(200, {}, event.encode())] * 2  # a shell's end of input is a call, too
    command(None, *words, env={"ERA_SERVER": scripted.url}, code=left_with)


async def test_a_server_that_vanishes_without_a_word_is_noticed(
    scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the system, which asks an idle connection's other end: a call may wait for a day."""
    made, setsockopt = [], socket.socket.setsockopt

    def recording(self: socket.socket, *option: Any) -> None:
        made.append(option)
        setsockopt(self, *option)

    monkeypatch.setattr(socket.socket, "setsockopt", recording)
    asked = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)]
    scripted.script = [INFO, INFO]
    with Era(scripted.url) as client:
        client.sessions.get("x")
    assert set(asked) <= set(made)
    made.clear()
    async with AsyncEra(scripted.url) as waiting:
        await waiting.sessions.get("x")
    assert set(asked) <= set(made)
