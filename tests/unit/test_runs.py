"""core.Runs: the path of a run in a session, and the order of many."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

import pytest
from structlog.testing import capture_logs

from era.core.execution.run_messages import RunResult, RunStarted
from era.core.execution.transcript import Piece
from era.core.models import StoredCode, now
from era.core.secrets import secret
from era.errors import (
    CommitFailed,
    Forbidden,
    NoCode,
    NotFound,
    SandboxFailed,
    SessionDeleted,
    SetupUnderWay,
    TooManyWaiting,
)
from tests.owners import mine
from tests.unit.core import URL, Core, Listener, request, until

WRITE_STATE = "import json\njson.dump({'n': %d}, open('.session_data.json', 'w'))\n"


async def data_of(core: Core) -> Any:
    return json.loads((await core.store.session(mine("s"))).data)


async def version_of(core: Core) -> int:
    return (await core.store.session(mine("s"))).version


# -- one run --------------------------------------------------------------------------------------------------------


async def test_the_answer_of_a_run(core: Core) -> None:
    await core.session(data='{"n": 1}')
    collected = await core.run("import sys\nprint('out')\nprint('err', file=sys.stderr)\n" + WRITE_STATE % 2)
    assert (collected.stdout, collected.stderr) == (b"out\n", b"err\n")
    result = collected.result
    assert (result.status, result.exit_code, result.data) == ("ok", 0, {"n": 2})
    assert (result.state.version, result.state.committed, result.state.reason) == (2, True, None)
    assert await data_of(core) == {"n": 2}
    record = await core.record(result.run_id)
    assert (record.status, record.committed, record.version, record.stdout_bytes) == ("ok", True, 2, 4)
    assert record.enforced == {"driver": "fake", "network": "none"}


@pytest.mark.parametrize("persistent", [True, False])
async def test_a_run_that_changed_nothing_makes_no_version(core: Core, persistent: bool) -> None:
    session = await core.session(data='{"n":1}', persistent=persistent)
    await core.run("open('a', 'w').write('kept')\n" + WRITE_STATE % 2)
    before = await core.store.session(mine("s"))
    for code in (
        "print(open('.session_data.json').read())",
        "import json; json.dump({'n': 2}, open('.session_data.json', 'w'))",  # the same, written in another way
        "open('b', 'w').close(); import os; os.remove('b')",
        "1 / 0",
    ):
        result = (await core.run(code)).result
        assert (result.state.version, result.state.committed, result.state.reason) == (2, True, None), code
        record = await core.record(result.run_id)
        assert (record.committed, record.version) == (True, 2)
        after = await core.store.session(mine("s"))
        assert (after.version, after.updated_at) == (2, before.updated_at)
        assert after.last_run_at == record.ended_at
    assert [each.n for each in await core.store.versions(mine("s"), limit=9, before=None)] == [2, 1]
    assert len(core.driver.made) == 1, "its sandbox is kept"
    assert (await core.run("import os, time; time.sleep(0.01); open('a', 'w').write('kept')")).result.state.version == (
        3 if persistent else 2
    ), "a file that is written anew has another time"
    assert len(await core.store.runs(session.key, 99)) == 6


async def test_files_are_there_in_the_next_sandbox(core: Core) -> None:
    session = await core.session()
    await core.run("open('a', 'w').write('kept')")
    await core.pool.release(session.key)
    assert (await core.run("print(open('a').read())")).stdout == b"kept\n"
    assert len(core.driver.made) == 2


async def test_stored_code_runs_where_a_run_brings_none(core: Core) -> None:
    session = await core.session()
    with pytest.raises(NoCode):
        await core.run()
    await core.store.store_code(mine("s"), StoredCode("print('stored')", "why", now()))
    collected = await core.run()
    assert collected.stdout == b"stored\n"
    assert collected.result.data == {}  # a view's fields are in answers about sessions only
    with pytest.raises(Forbidden):
        await core.run(public=True)
    with pytest.raises(NotFound):
        await core.run(session_key=session.key + 1)
    assert len(await core.records()) == 1


async def test_what_a_program_finds_in_its_environment(core: Core) -> None:
    await core.session(setup='{"envs": {"FROM_SETUP": "1", "BOTH": "setup"}}')
    core.setup_may_end.set()
    job = (await core.store.unfinished_setups())[0]
    await core.store.end_setup(job, status="completed", result="{}", package_set=None)
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    env = {"GIVEN": "2", "BOTH": "run", "ERA_SESSION_ID": "forged", "ERA_STORAGE_URL": "forged"}
    found = json.loads((await core.run(show, env=env)).stdout)
    assert {name: found[name] for name in ("FROM_SETUP", "BOTH", "GIVEN")} == {
        "FROM_SETUP": "1",
        "BOTH": "run",
        "GIVEN": "2",
    }
    assert {name: found[name] for name in found if name.startswith("ERA_")} == {
        "ERA_SESSION": "true",
        "ERA_SESSION_ID": "s",
        "ERA_LANGUAGE": "python",
        "ERA_BASE_URL": URL,
        "ERA_PROXY_URL": f"{URL}/proxy/s",
        "ERA_STORAGE_URL": URL,
    }


async def test_the_network_is_asked_for_what_the_session_may_have(core: Core) -> None:
    await core.session(allow_internet=True, egress={"allow": ["api.example.test"]})
    token = secret("TOKEN", "the value itself", ["api.example.test"], set())
    collected = await core.run("import os; print(os.environ['TOKEN'])", secrets=[token])
    assert collected.stdout.decode().strip() == token.placeholder
    assert core.network.asked == [(True, {"allow": ["api.example.test"]}, [token])]
    record = await core.record(collected.result.run_id)
    assert record.enforced["network_reason"] == "this kind of sandbox has no way out"


async def test_env_and_secrets_are_in_no_row_and_no_log(core: Core) -> None:
    await core.session()
    token = secret("TOKEN", "value-of-the-secret", ["api.example.test"], set())
    claim = core.claim("key", hidden={"env": {"NAME": "value-of-env"}})
    with capture_logs() as logs:
        await core.run("pass", env={"NAME": "value-of-env"}, secrets=[token], claim=claim)
        core.driver.made[0].kill()
        core.driver.dead_on_arrival = 2
        with pytest.raises(SandboxFailed):
            await core.run("pass", env={"NAME": "value-of-env"}, secrets=[token])
    kept = b"".join(path.read_bytes() for path in core.directory.rglob("*") if path.is_file())
    assert b"run_" in kept
    for value in (b"value-of-env", b"value-of-the-secret", token.placeholder.encode()):
        assert value not in kept
        assert value.decode() not in str(logs)
    for described in (request("pass", env={"NAME": "value-of-env"}, secrets=[token], claim=claim), token):
        assert "value-of" not in repr(described)


# -- how runs end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "status", "exit_code"),
    [
        ("raise SystemExit(3)", "failed", 3),
        ("1 / 0", "failed", 1),
        ("os.kill(os.getpid(), 9)", "killed", 137),
        ("time.sleep(60)", "timeout", 124),
    ],
)
@pytest.mark.parametrize("atomic", [False, True])
async def test_what_a_run_that_fails_leaves(core: Core, ending: str, status: str, exit_code: int, atomic: bool) -> None:
    await core.session(data='{"n": 0}')
    code = f"import os, time\nopen('a', 'w').close()\n{WRITE_STATE % 1}\n{ending}"
    result = (await core.run(code, atomic=atomic, timeout=1 if status == "timeout" else 60)).result
    assert (result.status, result.exit_code) == (status, exit_code)
    assert result.state.committed is not atomic
    assert result.data == await data_of(core) == ({"n": 0} if atomic else {"n": 1})
    assert (await core.run("import os; print(os.path.exists('a'))")).stdout == (b"False\n" if atomic else b"True\n")
    if atomic:
        assert result.state.reason is not None
        assert result.state.reason.startswith("atomic: the run ")


async def test_a_run_s_own_timeout_and_the_session_s(core: Core) -> None:
    await core.session(default_timeout=0.2)
    assert (await core.run("import time; time.sleep(60)")).result.status == "timeout"
    assert (await core.run("import time; time.sleep(0.4)", timeout=60)).result.status == "ok"


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("open('.session_data.json', 'w').write('{')", "is not JSON"),
        ("open('.session_data.json', 'w').write('[1]')", "is a list, not an object"),
        ("os.remove('.session_data.json'); os.mkdir('.session_data.json')", "is not a regular file"),
    ],
)
async def test_a_broken_state_file_keeps_the_last_good_data_and_files(core: Core, state: str, reason: str) -> None:
    await core.session(data='{"n": 0}')
    result = (await core.run(f"import os\nopen('a', 'w').close()\n{state}")).result
    assert (result.status, result.state.committed, result.data) == ("ok", False, {"n": 0})
    assert result.state.reason is not None
    assert reason in result.state.reason
    assert result.state.reason.endswith("; data and files stay as they were.")
    assert (await core.run("import os; print(os.listdir())")).stdout.decode().count("'a'") == 0
    assert await data_of(core) == {"n": 0}


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("for i in range(40): open(f'f{i}', 'w').close()", "disk_full", "20 files"),
        ("import os\nfor i in range(140): os.mkdir('d'); os.chdir('d')", "ok", "nested deeper than 128"),
    ],
)
async def test_files_that_can_t_be_kept(core: Core, code: str, status: str, reason: str) -> None:
    await core.session(data='{"n": 0}', limits={"files": 20 if status == "disk_full" else 1000})
    result = (await core.run(WRITE_STATE % 1 + code)).result
    assert (result.status, result.state.committed, result.data) == (status, False, {"n": 0})
    assert result.state.reason is not None
    assert reason in result.state.reason
    assert core.driver.alive == []
    assert (await core.run("import os; print(os.listdir())")).stdout.decode().count("'") == 4  # state and main.py


# -- sandboxes that die ---------------------------------------------------------------------------------------------


async def test_a_sandbox_that_dies_before_the_program_is_replaced_once(core: Core) -> None:
    await core.session()
    core.driver.dead_on_arrival = 1
    result = (await core.run("print('ran')")).result
    assert (result.status, result.state.committed) == ("ok", True)
    assert len(core.driver.made) == 2
    assert [record.id for record in await core.records()] == [result.run_id]


async def test_a_second_one_that_dies_is_an_error(core: Core) -> None:
    await core.session()
    core.driver.dead_on_arrival = 2
    with pytest.raises(SandboxFailed):
        await core.run("print('ran')")
    assert len(core.driver.made) == 2
    (record,) = await core.records()
    assert (record.status, record.committed, record.reason) == ("failed", False, "The sandbox is gone.")
    assert (await core.run("print('ran')")).stdout == b"ran\n"


async def test_a_sandbox_that_dies_under_a_program_is_not_a_second_run(core: Core) -> None:
    await core.session(data='{"n": 0}')
    code, _ = core.paused()
    counter = core.directory / "counter"
    listener = Listener(core.runs.stream(mine("s"), request(f"open({str(counter)!r}, 'a').write('x')\n{code}")))
    await listener.wait_for_output("paused")
    core.driver.made[0].kill()
    result = await listener.task
    assert (result.status, result.data) == ("killed", {"n": 0})
    assert counter.read_text() == "x"


# -- commits that fail ----------------------------------------------------------------------------------------------


async def failing(*_: Any, **__: Any) -> Any:
    raise CommitFailed("the disk is no more")


@pytest.mark.parametrize("broken", ["store", "snapshots", "artifacts", "outputs"])
async def test_a_commit_that_fails_is_an_error_and_changes_nothing(
    core: Core, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    await core.session(data='{"n": 0}')
    await core.run("open('old', 'w').close()")
    before = await core.store.session(mine("s"))
    part, name = {
        "store": (core.store, "end_run"),
        "snapshots": (core.snapshots, "take"),
        "artifacts": (core.snapshots, "artifacts"),
        "outputs": (core.outputs, "keep"),
    }[broken]
    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(part, name, failing)
        with pytest.raises(CommitFailed, match="no more"):
            await core.run("import os\nos.remove('old')\nopen('new', 'w').close()\n" + WRITE_STATE % 1)
    after = await core.store.session(mine("s"))
    assert (after.data, after.version, after.snapshot) == (before.data, before.version, before.snapshot)
    assert core.driver.alive == [], "the sandbox holds files that were not committed"
    record = (await core.records())[-1]
    if broken == "store":
        assert record.status == "running", "nobody could record anything else"
        assert {log["event"] for log in logs} == {"run_not_recorded"}
        record = await core.ended_record()  # now that can be done
    assert (record.status, record.committed, record.reason) == ("failed", False, "the disk is no more")
    assert "'old'" in (await core.run("import os; print(os.listdir())")).stdout.decode()


async def test_a_session_deleted_under_a_run(core: Core) -> None:
    session = await core.session()
    code, go = core.paused()
    listener = Listener(core.runs.stream(mine("s"), request(code)))
    await listener.wait_for_output("paused")
    await core.store.delete_session(mine("s"))
    go.touch()
    with pytest.raises(SessionDeleted):
        await listener.task
    assert core.driver.alive == []
    (record,) = await core.store.runs(session.key, 10)
    assert (record.status, record.committed) == ("ok", False), "the program ended well, and nothing of it was kept"


async def test_runs_that_were_cut_off_are_lost(core: Core) -> None:
    await core.session()
    await core.store.begin_run(mine("s"), "run_1")
    assert await core.store.mark_lost() == 1
    assert (await core.record("run_1")).status == "lost"
    assert (await core.run("pass")).result.status == "ok"
    assert await core.store.mark_lost() == 0


# -- streaming ------------------------------------------------------------------------------------------------------


async def test_events_come_in_order_and_as_they_happen(core: Core) -> None:
    await core.session()
    code, go = core.paused()
    listener = Listener(core.runs.stream(mine("s"), request(f"print('first')\n{code}print('last')")))
    await listener.wait_for_output("paused\n")
    started = listener.events[0]
    assert isinstance(started, RunStarted)
    assert (await core.record(started.run_id)).status == "running"
    assert await core.output(started.run_id) == b"first\npaused\n"
    go.touch()
    result = await listener.task
    assert result.run_id == started.run_id
    assert listener.output == "first\npaused\nlast\n"
    assert [type(event) for event in listener.events] == [
        RunStarted,
        *[Piece] * (len(listener.events) - 2),
        RunResult,
    ]
    assert await core.output(started.run_id) == b"first\npaused\nlast\n"


async def test_an_answer_comes_after_its_commit(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    await core.session()
    may_commit, real = asyncio.Event(), core.store.end_run

    async def slow(*given: Any, **options: Any) -> Any:
        await may_commit.wait()
        return await real(*given, **options)

    monkeypatch.setattr(core.store, "end_run", slow)
    listener = Listener(core.runs.stream(mine("s"), request("print('done')")))
    await listener.wait_for_output("done")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(listener.task), 0.2)
    may_commit.set()
    assert (await listener.task).state.committed


@pytest.mark.parametrize("hang_up", ["stream", "run"])
async def test_a_run_goes_on_when_its_caller_hangs_up(core: Core, hang_up: str) -> None:
    session = await core.session(data='{"n": 0}')
    code, go = core.paused()
    code += WRITE_STATE % 1
    if hang_up == "stream":
        listener = Listener(core.runs.stream(mine("s"), request(code)))
        await listener.wait_for_output("paused")
        task: asyncio.Task[Any] = listener.task
    else:
        task = asyncio.create_task(core.run(code))
        await until(lambda: (run := core.active_runs.of_session(session.key)) and run.sandbox)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert await data_of(core) == {"n": 0}
    go.touch()
    await core.runs.drain(10)
    assert await data_of(core) == {"n": 1}
    assert [record.status for record in await core.records()] == ["ok"]


async def test_draining_waits_for_runs_and_not_for_ever(core: Core) -> None:
    await core.session()
    await core.runs.drain(10)
    code, go = core.paused()
    listener = Listener(core.runs.stream(mine("s"), request(code)))
    await listener.wait_for_output("paused")
    await core.runs.drain(0.1)
    assert not listener.task.done()
    go.touch()
    await core.runs.drain(10)
    assert (await core.records())[0].status == "ok"


# -- turns ----------------------------------------------------------------------------------------------------------


async def test_runs_of_a_session_take_turns_in_the_order_of_arrival(core: Core) -> None:
    await core.session(data='{"order": []}')
    code, go = core.paused()
    first = Listener(core.runs.stream(mine("s"), request(code)))
    await first.wait_for_output("paused")
    append = "import json\nd = json.load(open('.session_data.json'))\nd['order'].append(%d)\n"
    append += "json.dump(d, open('.session_data.json', 'w'))"
    others = []
    for number in range(5):
        others.append(asyncio.create_task(core.run(append % number)))
        await asyncio.sleep(0)
    assert len(await core.records()) == 1, "who waits is not on record"
    go.touch()
    await asyncio.gather(first.task, *others)
    assert await data_of(core) == {"order": [0, 1, 2, 3, 4]}
    assert await version_of(core) == 6, "the first one changed nothing"


async def test_a_queue_has_a_bound(core: Core) -> None:
    await core.session()
    code, go = core.paused()
    first = Listener(core.runs.stream(mine("s"), request(code)))
    await first.wait_for_output("paused")
    waiting = [asyncio.create_task(core.run("pass")) for _ in range(8)]
    await asyncio.sleep(0)
    with pytest.raises(TooManyWaiting):
        await core.run("pass")
    go.touch()
    await asyncio.gather(first.task, *waiting)


# -- setups ---------------------------------------------------------------------------------------------------------


async def test_a_run_waits_for_its_session_s_setup(core: Core) -> None:
    await core.session(setup='{"pip": ["x"]}')
    running = asyncio.create_task(core.run("print('after')", timeout=5))
    await asyncio.sleep(0.05)
    assert await core.records() == []
    job = (await core.store.unfinished_setups())[0]
    await core.store.end_setup(job, status="completed", result="{}", package_set="digest")
    core.setup_may_end.set()
    assert (await running).stdout == b"after\n"
    assert core.packages.needed == ["digest"]


async def test_a_run_waits_no_longer_than_it_may_take(core: Core) -> None:
    await core.session(setup='{"pip": ["x"]}', default_timeout=0.05)
    with pytest.raises(SetupUnderWay):
        await core.run("print('after')")
    assert await core.records() == []


# -- runs outside any session ---------------------------------------------------------------------------------------


async def test_a_run_without_a_session_leaves_nothing(core: Core) -> None:
    show = "import os; print(open('in/file').read(), os.environ['GIVEN'], os.environ['ERA_SESSION_ID'])"
    collected = await core.execute(show, files={"in/file": b"content"}, env={"GIVEN": "1"})
    result = collected.result
    assert collected.stdout.decode().split() == ["content", "1", result.run_id]
    assert (result.status, result.data, result.state.committed) == ("ok", {}, False)
    assert core.driver.alive == []
    assert await core.store.counts() == await core.store.counts() | {"sessions": 0}
    assert not [path for path in (core.directory / "blobs").rglob("*") if path.is_file()]
    with pytest.raises(NotFound):
        await core.record(result.run_id)


async def test_who_hangs_up_on_it_ends_it_and_leaves_no_sandbox_behind(core: Core) -> None:
    code, _ = core.paused()
    task = asyncio.create_task(core.execute(code))
    await until(lambda: core.driver.alive)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not core.driver.alive)
