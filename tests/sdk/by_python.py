"""The steps of scenarios as calls of the Python SDK. The blocking client and the one for asyncio share this: what
they return is awaited if it can be."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from era import AsyncEra, Era
from era.sdk.answers import View
from era.sdk.events import ProcessOutput
from tests.sdk.scenarios import bytes_of, shown

type Step = Callable[[Any, Any, dict[str, Any]], Awaitable[Any]]
STEPS: dict[str, Step] = {}


def step(name: str) -> Callable[[Step], Step]:
    def add(function: Step) -> Step:
        STEPS[name] = function
        return function

    return add


async def done(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


async def each(iterable: Any) -> list[Any]:
    return [item async for item in iterable] if hasattr(iterable, "__aiter__") else list(iterable)


async def take(era: Era | AsyncEra, name: str, on: str | None, args: dict[str, Any]) -> Any:
    """Do a step; what comes of it, in the shape of the HTTP API. Raises EraError."""
    session = None
    if on is not None and not name.startswith("sessions."):
        session = await done(era.sessions.get(on))
    value = await STEPS[name](era, on if session is None else session, args)
    return plain(value)


def plain(value: Any) -> Any:
    if isinstance(value, View):
        return value.answer
    return [plain(item) for item in value] if isinstance(value, list) else value


@step("sessions.create")
async def create(era: Any, _: Any, args: dict[str, Any]) -> Any:
    id = args.pop("session_id", None)
    session = await done(era.session(args.pop("language"), id, **args))
    return await done(session.info())


@step("sessions.get")
async def get(era: Any, on: str, _: Any) -> Any:
    return await done((await done(era.sessions.get(on))).info())


@step("sessions.list")
async def list_sessions(era: Any, _: Any, args: dict[str, Any]) -> Any:
    return {"sessions": plain(await done(era.sessions.infos(**args)))}


@step("sessions.update")
async def update(era: Any, on: str, args: dict[str, Any]) -> Any:
    return await done((await done(era.sessions.get(on))).update(**args))


@step("sessions.delete")
async def delete(era: Any, on: str, _: Any) -> Any:
    await done(era.sessions.delete(on))
    return {"success": True, "id": on}


@step("sessions.restore")
async def restore(era: Any, on: str, _: Any) -> Any:
    return await done((await done(era.sessions.restore(on))).info())


@step("run")
async def run(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return await done(session.run(**args))


@step("stream")
async def stream(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return await _followed(await done(session.stream(**args)))


@step("execute.stream")
async def execute_stream(era: Any, _: Any, args: dict[str, Any]) -> Any:
    return await _followed(await done(era.stream(**args)))


async def _followed(following: Any) -> Any:
    events = await each(following)
    result = following.result
    for kind in ("stdout", "stderr"):
        told = "".join(event.content for event in events if event.answer["type"] == kind)
        assert told == result.answer[kind]
    return result


@step("background")
async def background(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return {"run_id": (await done(session.run(background=True, **args))).id, "status": "running"}


@step("execute")
async def execute(era: Any, _: Any, args: dict[str, Any]) -> Any:
    return await done(era.execute(**args))


@step("data.get")
async def data_get(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return await done(session.data.get(args["key"]))


@step("data.all")
async def data_all(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return await done(session.data.all())


@step("data.set")
async def data_set(_: Any, session: Any, args: dict[str, Any]) -> Any:
    await done(session.data.set(args["key"], args["value"]))


@step("data.delete")
async def data_delete(_: Any, session: Any, args: dict[str, Any]) -> Any:
    await done(session.data.delete(args["key"]))


@step("code.get")
async def code_get(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return await done(session.code())


@step("code.set")
async def code_set(_: Any, session: Any, args: dict[str, Any]) -> Any:
    await done(session.set_code(**args))
    return {"code_length": (await done(session.code())).code_length}


@step("files.write")
async def write(_: Any, session: Any, args: dict[str, Any]) -> Any:
    content = bytes_of(args["content"])
    await done(session.files.write(args["path"], content))
    return {"path": args["path"], "size": len(content)}


@step("files.read")
async def read(_: Any, session: Any, args: dict[str, Any]) -> Any:
    content = await done(session.files.read(args["path"]))
    assert b"".join(await each(session.files.pieces(args["path"]))) == content
    return shown(content)


@step("files.list")
async def list_files(_: Any, session: Any, args: dict[str, Any]) -> Any:
    found = await done(session.files.list(**args))
    return {"files": plain(found), "count": len(found)}


@step("files.delete")
async def delete_file(_: Any, session: Any, args: dict[str, Any]) -> Any:
    await done(session.files.remove(**args))
    return {"success": True}


@step("versions.list")
async def list_versions(_: Any, session: Any, args: dict[str, Any]) -> Any:
    found = await done(session.versions.list())
    return {"versions": plain(found), "count": len(found)}


@step("versions.get")
async def get_version(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return await done(session.versions.get(**args))


@step("versions.diff")
async def diff(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return await done(session.versions.diff(**args))


@step("rollback")
async def rollback(_: Any, session: Any, args: dict[str, Any]) -> Any:
    await done(session.rollback(**args))
    return await done(session.info())


@step("duplicate")
async def duplicate(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return await done((await done(session.duplicate(**args))).info())


@step("runs.list")
async def list_runs(_: Any, session: Any, args: dict[str, Any]) -> Any:
    found = await done(session.runs.list(**args))
    return {"runs": plain(found), "count": len(found)}


@step("runs.get")
async def get_run(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return await done(session.runs.get(args["run_id"]).record())


@step("runs.wait")
async def wait(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return await done(session.runs.get(args["run_id"]).wait())


@step("runs.stop")
async def stop(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return await done(session.runs.get(args["run_id"]).stop())


@step("runs.output")
async def output(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return shown(await done(session.runs.get(args["run_id"]).output()))


@step("setup.wait")
async def setup(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return await done(session.wait_for_setup())


@step("host")
async def host(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return {"url": await done(session.proxy_url(args["port"])), "port": args["port"]}


@step("processes.start")
async def start(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return await done((await done(session.process(**args))).info())


@step("processes.list")
async def list_processes(_: Any, session: Any, args: dict[str, Any]) -> Any:
    found = await done(session.processes.list())
    return {"processes": plain(found), "count": len(found)}


@step("processes.signal")
async def signal(_: Any, session: Any, args: dict[str, Any]) -> Any:
    await done(session.processes.get(args["process"]).signal(args["signal"]))


@step("processes.output")
async def process_output(_: Any, session: Any, args: dict[str, Any]) -> Any:
    *output, end = await each(session.processes.get(args["process"]).events())
    assert all(isinstance(event, ProcessOutput) for event in output)
    told = b"".join(event.data for event in output if event.type == "stdout")
    return {"stdout": told.decode(), "exit_code": end.exit_code}


@step("processes.talk")
async def talk(era: Any, session: Any, args: dict[str, Any]) -> Any:
    process = session.processes.get(args["process"])
    await done(process.write(args["input"]))
    await done(process.close_stdin())
    return await process_output(era, session, args)


@step("processes.stop")
async def stop_process(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return await done(session.processes.get(args["process"]).stop())


@step("checkpoint")
async def checkpoint(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return await done(session.checkpoint())


@step("sessions.stop")
async def stop_session(era: Any, on: str, _: Any) -> Any:
    return await done((await done(era.sessions.get(on))).stop())


@step("cell")
async def cell(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return await done(session.context(args.pop("context")).run(**args))


@step("contexts.list")
async def list_contexts(_: Any, session: Any, args: dict[str, Any]) -> Any:
    found = await done(session.contexts())
    return {"contexts": plain(found), "count": len(found)}


@step("contexts.interrupt")
async def interrupt(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return {"interrupted": await done(session.context(args["context"]).interrupt())}


@step("contexts.restart")
async def restart(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return await done(session.context(args["context"]).restart())


@step("contexts.delete")
async def delete_context(_: Any, session: Any, args: dict[str, Any]) -> Any:
    await done(session.context(args["context"]).delete())
    return {"success": True}


@step("inbox.get")
async def get_inbox(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return await done(session.inbox.get())


@step("inbox.set")
async def set_inbox(_: Any, session: Any, args: dict[str, Any]) -> Any:
    return await done(session.inbox.set(**args))


@step("inbox.deliveries")
async def deliveries(_: Any, session: Any, args: dict[str, Any]) -> Any:
    found = await done(session.inbox.deliveries())
    return {"deliveries": plain(found), "count": len(found)}


@step("inbox.delete")
async def delete_inbox(_: Any, session: Any, args: dict[str, Any]) -> Any:
    await done(session.inbox.delete())
    return {"success": True}


@step("move")
async def move(era: Any, session: Any, args: dict[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as place:
        capsule = Path(place) / "capsule.tar"
        assert await done(session.export(capsule)) == capsule.stat().st_size
        return await done((await done(era.sessions.import_(str(capsule), **args))).info())


@step("webhooks.create")
async def create_webhook(era: Any, _: Any, args: dict[str, Any]) -> Any:
    return await done(era.webhooks.create(**args))


@step("webhooks.deliveries")
async def notices(era: Any, _: Any, args: dict[str, Any]) -> Any:
    return await done(era.webhooks.deliveries(args["id"]))


@step("webhooks.replay")
async def replay_notice(era: Any, _: Any, args: dict[str, Any]) -> Any:
    return await done(era.webhooks.replay(args["id"], args["delivery_id"]))


@step("webhooks.delete")
async def delete_webhook(era: Any, _: Any, args: dict[str, Any]) -> Any:
    await done(era.webhooks.delete(args["id"]))


@step("audit")
async def audit(era: Any, _: Any, args: dict[str, Any]) -> Any:
    return await done(era.audit(**args))


@step("kv.set")
async def kv_set(era: Any, _: Any, args: dict[str, Any]) -> Any:
    await done(era.storage.kv.set(**args))


@step("kv.get")
async def kv_get(era: Any, _: Any, args: dict[str, Any]) -> Any:
    return await done(era.storage.kv.get(**args))


@step("kv.list")
async def kv_list(era: Any, _: Any, args: dict[str, Any]) -> Any:
    return await done(era.storage.kv.list(**args))


@step("kv.delete")
async def kv_delete(era: Any, _: Any, args: dict[str, Any]) -> Any:
    await done(era.storage.kv.delete(**args))


@step("d1.exec")
async def d1_exec(era: Any, _: Any, args: dict[str, Any]) -> Any:
    return await done(era.storage.d1.exec(**args))


@step("d1.query")
async def d1_query(era: Any, _: Any, args: dict[str, Any]) -> Any:
    return await done(era.storage.d1.query(**args))


@step("r2.put")
async def r2_put(era: Any, _: Any, args: dict[str, Any]) -> Any:
    await done(era.storage.r2.put(args["namespace"], args["key"], bytes_of(args["content"])))


@step("r2.get")
async def r2_get(era: Any, _: Any, args: dict[str, Any]) -> Any:
    return shown(await done(era.storage.r2.get(**args)))


@step("r2.list")
async def r2_list(era: Any, _: Any, args: dict[str, Any]) -> Any:
    return await done(era.storage.r2.list(**args))
