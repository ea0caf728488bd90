"""What goes wrong between a client and a server: the right class of error with what to do, and nothing lost or done
twice."""

from __future__ import annotations

import asyncio
import copy
import pickle
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import era
from era import AsyncEra, Era
from era.errors import RangeNotSatisfiable
from era.sdk.answers import ApiKey, RunFailed, RunRecord, RunResult, Webhook
from era.sdk.events import Gap, SetupDone, SetupLine, Stdout
from tests.api.told import TELLS_ITS_END, has_ended
from tests.conftest import MakeServer, Server, eventually, free_port
from tests.sdk.cutter import Cutter, cut_once_after
from tests.sdk.scripted import Script, ScriptedServer, refusal, serving

NUMBERS = "import time\nfor n in range(40):\n    print(n, flush=True)\n    time.sleep(0.02)"
ALL = "".join(f"{n}\n" for n in range(40))


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    with serving() as server:
        yield server


def test_nobody_is_there() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with Era(url, retries=1) as client, pytest.raises(era.ServerAway) as told:
        client.sessions.list()
    assert url in str(told.value)
    assert "era serve" in told.value.hint


async def test_nobody_is_there_for_asyncio() -> None:
    async with AsyncEra(f"http://127.0.0.1:{free_port()}", retries=0) as client:
        with pytest.raises(era.ServerAway):
            await client.sessions.list()


def test_what_is_shown_once_is_not_in_what_is_printed() -> None:
    made = ApiKey({"id": "key_1", "owner": "mina", "key": "era_canary"})
    assert (repr(made), made.key) == ("ApiKey(id='key_1', owner='mina', key=…)", "era_canary")
    hook = Webhook({"id": "wh_1", "secret": "whsec_canary"})
    assert (f"{[hook]}", hook.secret) == ("[Webhook(id='wh_1', secret=…)]", "whsec_canary")


def test_something_else_is_there(scripted: ScriptedServer) -> None:
    scripted.script = [(200, {}, b"<html>"), (404, {}, b"nginx"), (200, {}, b"<html>")]
    with Era(scripted.url) as client:
        for _ in range(2):
            with pytest.raises(era.NotEra):
                client.sessions.list()


async def test_a_redirect_is_no_answer(scripted: ScriptedServer) -> None:
    scripted.script = [(302, {"Location": "https://login/at?token=canary"}, b"<html>Elsewhere")] * 2
    with Era(scripted.url) as client, pytest.raises(era.NotEra, match="redirects to https://login/at,") as told:
        client.sessions.named("x").files.read("a")
    assert (told.value.status, "canary" in str(told.value)) == (302, False)
    async with AsyncEra(scripted.url) as waiting:
        with pytest.raises(era.NotEra, match="redirects"):
            await waiting.sessions.named("x").files.read("a")


def test_answers_and_errors_can_be_copied_and_pickled(scripted: ScriptedServer) -> None:
    """As pools of processes do with what their work returns or raises."""
    run = RunResult({"run_id": "r", "status": "failed", "exit_code": 3, "stderr": "no\n", "data": {"n": [1]}})
    for copied in (copy.copy(run), copy.deepcopy(run), pickle.loads(pickle.dumps(run))):
        assert (copied, type(copied), copied.data) == (run, RunResult, {"n": [1]})
    with pytest.raises(RunFailed) as failed:
        run.check()
    scripted.script = [refusal(416, "range_not_satisfiable")]
    with Era(scripted.url) as client, pytest.raises(RangeNotSatisfiable) as told:
        client.sessions.get("x")
    for error in (failed.value, told.value):
        for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
            assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "invalid_field", era.BadRequest),
        (401, "unauthorized", era.Unauthorized),
        (404, "no_file", era.NotFound),
        (409, "idempotency_mismatch", era.errors.KeyReused),
        (409, "something_new", era.Conflict),
        (410, "expired", era.Expired),
        (429, "too_busy", era.TooBusy),
        (429, "too_many_waiting", era.TooManyWaiting),
        (503, "commit_failed", era.errors.CommitFailed),
        (418, "teapot", era.EraError),
    ],
)
def test_each_refusal_has_its_class(scripted: ScriptedServer, status: int, code: str, kind: type[era.EraError]) -> None:
    scripted.script = [refusal(status, code)]
    with Era(scripted.url) as client, pytest.raises(kind) as told:
        client.sessions.get("x")
    error = told.value
    assert type(error) is kind
    assert (error.status, error.code, error.message, error.hint) == (status, code, "No.", "Do this.")
    assert error.request_id == "req_1"
    assert str(error) == "No. Do this."


def test_what_is_refused_for_now_is_tried_again(scripted: ScriptedServer) -> None:
    done: Script = (200, {}, b'{"run_id": "run_1", "status": "ok"}')
    info: Script = (200, {}, b'{"id": "x", "language": "python", "default_timeout": 30}')
    scripted.script = [info, refusal(429, "too_busy", **{"Retry-After": "0"}), done]
    with Era(scripted.url) as client:
        assert client.sessions.get("x").run("1").run_id == "run_1"
    first, second = (seen[2]["Idempotency-Key"] for seen in scripted.seen[1:])
    assert first == second


def test_nothing_is_tried_again_later_than_its_answer_is_wanted(scripted: ScriptedServer) -> None:
    """The script has one answer for each call: another attempt would have none."""
    late = refusal(503, "too_busy", **{"Retry-After": "20"})
    scripted.script = [late]
    with Era(scripted.url, timeout=19) as client, pytest.raises(era.Unavailable) as told:
        client.health()
    assert told.value.retry_after == 20
    assert len(scripted.seen) == 1
    with Era(f"http://127.0.0.1:{free_port()}", timeout=0.05) as client, pytest.raises(era.ServerAway):
        client.health()


def test_a_change_is_not_tried_again_where_it_may_be_done_already(scripted: ScriptedServer) -> None:
    info: Script = (200, {}, b'{"id": "x", "language": "python", "default_timeout": 30}')
    scripted.script = [info, refusal(503, "commit_failed"), info]
    with Era(scripted.url) as client:
        session = client.sessions.get("x")
        with pytest.raises(era.Unavailable):
            session.files.write("a", "b")
    assert len(scripted.seen) == 2


def test_a_wrong_key(own_server: MakeServer) -> None:
    server = own_server(api_key="right")
    with Era(server.url, api_key="wrong") as client, pytest.raises(era.Unauthorized):
        client.sessions.list()
    with Era(server.url, api_key="right") as client:
        assert client.sessions.list() == []


@pytest.mark.parametrize(
    "url",
    ["http://me:canary@127.0.0.1:1", "http://canary@127.0.0.1:1/x", "http://me:canary@[::1:1", "ftp://a:canary@b"],
)
async def test_a_password_in_an_address_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(era.EraError, match="password") as told:
        Era(url)
    assert "canary" not in f"{told.value!r} {told.value}"
    with pytest.raises(era.EraError, match="password"):
        AsyncEra(url)


def test_addresses_and_keys_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, scripted: ScriptedServer
) -> None:
    monkeypatch.setenv("ERA_SERVER", "http://other.invalid")
    monkeypatch.setenv("ERA_URL", f"{scripted.url}/")
    monkeypatch.setenv("ERA_API_KEY", "k")
    scripted.script = [(200, {}, b'{"status": "ok"}')]
    with Era() as client:
        assert client.health() == {"status": "ok"}
    assert scripted.seen[0][2]["Authorization"] == "Bearer k"


def test_a_broken_stream_goes_on_without_loss(server: Server) -> None:
    with Cutter(server.url, cut_once_after(b"7\\n")) as way, Era(way.url) as client:
        session = client.session("python")
        with session.stream(NUMBERS) as stream:
            events = list(stream)
        assert "".join(event.content for event in events if isinstance(event, Stdout)) == ALL
        assert stream.result.ok
        assert stream.result.stdout == ALL
        assert any(b"/events?after=" in request for request in way.requests)
        assert len(session.runs.list()) == 1


async def test_a_broken_stream_goes_on_for_asyncio(server: Server) -> None:
    with Cutter(server.url, cut_once_after(b"7\\n")) as way:
        async with AsyncEra(way.url) as client:
            session = await client.session("python")
            async with await session.stream(NUMBERS) as stream:
                assert (await stream.wait()).stdout == ALL


def test_a_broken_stream_without_a_session_says_so_and_ends_the_program(server: Server) -> None:
    with Cutter(server.url, cut_once_after(b"on\\n")) as way, Era(way.url) as client:
        # The cut may come before the beginning of the answer has.
        with pytest.raises(era.ConnectionLost), client.stream("python", TELLS_ITS_END, timeout=300) as stream:
            stream.wait()
        assert sum(b"/api/execute" in request for request in way.requests) == 1
    with server.client() as client_of_http:
        assert has_ended(client_of_http)


async def test_who_closes_a_stream_without_a_session_ends_the_program(server: Server) -> None:
    async with AsyncEra(server.url) as client, await client.stream("python", TELLS_ITS_END, timeout=300) as stream:
        assert (await anext(aiter(stream))).answer["content"] == "on\n"
        assert await client.storage.kv.get("ends", "one") != "told"
    with server.client() as client_of_http:
        assert await asyncio.to_thread(has_ended, client_of_http)


def test_a_run_whose_answer_is_lost_is_not_run_twice(server: Server) -> None:
    with Cutter(server.url, cut_once_after(b'"run_id"')) as way, Era(way.url) as client:
        session = client.session("python", data={"n": 0})
        code = "import json\nd = json.load(open('.session_data.json'))\nd['n'] += 1\n"
        code += "json.dump(d, open('.session_data.json', 'w'))"
        assert session.run(code).data == {"n": 1}
        assert session.data == {"n": 1}
        assert len(session.runs.list()) == 1


def test_a_write_whose_answer_is_lost_says_so(server: Server) -> None:
    with Cutter(server.url, cut_once_after(b'"path"')) as way, Era(way.url) as client:
        session = client.session("python")
        with pytest.raises(era.ConnectionLost) as told:
            session.files.write("a.txt", "x")
        assert "may have been done" in told.value.hint
        assert session.files["a.txt"] == b"x"


def test_no_answer_in_time(server: Server) -> None:
    with Era(server.url) as client, Era(server.url, timeout=0.3) as hasty:
        session = client.session("python")
        with pytest.raises(era.AnswerTimeout) as told:
            hasty._connection.call(
                era.sdk.calls.Call(
                    "POST", f"/api/sessions/{session.id}/run", json={"code": "import time; time.sleep(2)"}
                )
            )
        assert "runs.list" in told.value.hint
        (run,) = eventually(session.runs.list)
        assert session.runs.get(run.run_id).wait().status == "ok"


def test_a_server_that_comes_back() -> None:
    port = free_port()

    def serve() -> None:
        with ScriptedServer((200, {}, b'{"status": "ok"}'), port=port) as server:
            server.handle_request()

    serving = threading.Timer(0.3, serve)
    serving.start()
    with Era(f"http://127.0.0.1:{port}", retries=8) as client:
        assert client.health() == {"status": "ok"}
    serving.join()


LOUD = "import sys; sys.stdout.write('x' * 6_000_000)"


async def test_a_server_that_restarts(own_server: MakeServer) -> None:
    """What a run has written comes whole, and a setup is followed to its end, by the server in the place of one that
    was killed. A run that was going on is lost, and that is what its stream says."""
    server = own_server(port=str(free_port()))
    with Era(server.url) as client:
        async with AsyncEra(server.url) as waiting:
            session, other = client.session("python", data={"n": 1}), client.session("python")
            stream = session.stream(LOUD)
            begun = [next(iter(stream))]
            asked = await (await waiting.sessions.get(other.id)).stream(LOUD)
            first = await anext(aiter(asked))
            for each, run_id in ((session, stream.run_id), (other, asked.run_id)):
                assert run_id is not None
                each.runs.get(run_id).wait()
            lost = session.stream("import time\nprint('on', flush=True)\ntime.sleep(600)", timeout=600)
            next(iter(lost))
            built = client.session("python", setup={"commands": ["echo waiting; sleep 2; echo on"]})
            setup = built.setup()
            while not isinstance(event := next(setup), SetupLine) or event.text != "waiting":
                pass
            # Nothing is read meanwhile, so most of the output is still with the server when it is killed.
            server.stop(signal.SIGKILL)
            server.start()
            assert session.data["n"] == 1
            begun += list(stream)
            assert all(isinstance(event, Stdout) for event in begun)
            assert len("".join(event.content for event in begun)) == len(stream.result.stdout) == 6_000_000
            assert isinstance(first, Stdout)
            assert len(first.content) + sum([len(event.content) async for event in asked]) == 6_000_000
            with pytest.raises(era.errors.RunLost):
                list(lost)
            *events, last = setup
            assert isinstance(last, SetupDone)
            assert last.setup_status == "completed", last
            told = [event.text for event in events if isinstance(event, SetupLine)]
            assert "on" in told or any(isinstance(event, Gap) for event in events)  # it may have ended by then


def test_local_files_that_cannot_be(server: Server, tmp_path: Path) -> None:
    with Era(server.url) as client:
        session = client.session("python")
        for failing in (
            lambda: session.files.write("a", tmp_path / "none"),
            lambda: session.files.push(tmp_path / "none"),
            lambda: session.export(tmp_path / "none" / "x.tar"),
        ):
            with pytest.raises(era.LocalError) as told:
                failing()
            assert "none" in str(told.value)


def test_a_long_upload_that_is_refused_says_why(server: Server, tmp_path: Path) -> None:
    """The server answers before it has read all, and closes."""
    (tmp_path / "large").write_bytes(bytes(64 << 20))
    with Era(server.url) as client:
        session = client.session("python", limits={"disk_mb": 16})
        with pytest.raises((era.TooLarge, era.ConnectionLost)):
            session.files.write("large", tmp_path / "large")
        assert session.files.list() == []


def test_the_end_of_a_block_deletes_sessions_made_without_an_id(server: Server) -> None:
    with Era(server.url) as client:
        outside = client.session("python")
        with client.session("python") as gone, client.session("python", "kept") as kept:
            gone.files["a"] = "b"
        with pytest.raises(era.NotFound):
            client.sessions.get(gone.id)
        with client.sessions.get(kept.id), client.sessions.get(outside.id):
            pass
        assert client.sessions.get(kept.id).id == "kept"
        assert client.sessions.get(outside.id).id == outside.id
        assert client.sessions.restore(gone.id).files["a"] == b"b"


def test_an_idempotency_key_runs_once(server: Server) -> None:
    code = "open('n', 'a').write('x'); print(open('n').read())"
    with Era(server.url) as client, client.session("python") as session:
        first = session.run(code, idempotency_key="order-1")
        assert session.run(code, idempotency_key="order-1").run_id == first.run_id
        with session.stream(code, idempotency_key="order-1") as stream:
            assert stream.wait().run_id == first.run_id
        assert session.files["n"] == b"x"
        assert session.run(code, idempotency_key="order-2").stdout == "xx\n"
        for key in ("a\r\nX-Evil: 1", ""):
            with pytest.raises(era.LocalError):
                session.run(code, idempotency_key=key)


def test_a_view_tells_what_a_newer_server_adds() -> None:
    record = RunRecord({"run_id": "r", "novelty": 1})
    assert record.answer["novelty"] == 1
    assert record.exit_code is None
    with pytest.raises(AttributeError):
        record.nonsense  # noqa: B018
    with pytest.raises(AttributeError):
        record.run_id = "x"


def test_closed_connections_are_noticed(server: Server) -> None:
    with Era(server.url) as client, httpx.Client(base_url=server.url):
        client.health()
        for *_, connection in client._connection._transport._idle:
            connection.sock.shutdown(socket.SHUT_RDWR)
        assert client.health()["status"] == "ok"
