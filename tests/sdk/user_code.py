"""Code as users write it, for the type checker: strict, and each type is what an editor would show. Nothing runs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, assert_type

from era import AsyncEra, AsyncSession, Era, EraError, ExecuteResult, NotFound, RunResult, Session
from era.sdk.answers import FileInfo, RunRecord, SessionInfo, Version
from era.sdk.events import Gap, ProcessExit, ProcessOutput, RunEvent, SetupDone
from era.sdk.sync.processes import Process
from era.sdk.sync.runs import Run, RunStream


def blocking() -> None:
    with Era("http://127.0.0.1:8787", api_key="k", timeout=5) as era:
        with era.session("python", data={"n": 1}, setup={"pip": ["requests"]}) as session:
            assert_type(session, Session)
            result = session.run("print(1)", env={"A": "1"}, timeout=3, secrets={"K": {"value": "v", "hosts": ["h"]}})
            assert_type(result, RunResult)
            assert_type(result.check().stdout, str)
            assert_type(result.state.version, int)
            assert_type(session.run("1", background=True), Run)
            assert_type(session.run(command=["ls"], background=False), RunResult)
            stream = session.stream("print(1)")
            assert_type(stream, RunStream)
            for event in stream:
                assert_type(event, RunEvent)
            session.data["n"] += 1
            session.files["a.txt"] = b"x"
            assert_type(session.files["a.txt"], bytes)
            assert_type(session.files.list(), list[FileInfo])
            assert_type(session.files.pieces("a.txt"), Iterator[bytes])
            assert_type(session.versions.list(5), list[Version])
            assert_type(session.runs.get("r").wait(), RunRecord)
            assert_type(session.wait_for_setup(), SetupDone)
            assert_type(session.info(), SessionInfo)
            assert_type(session.context("a").run("1").value, dict[str, Any] | None)
            process = session.process("npm run dev", tag="web", stdin=True)
            assert_type(process, Process)
            for told in process.events():
                assert_type(told, ProcessOutput | ProcessExit | Gap)
            assert_type(session.terminal(100, 30).wait().exit_code, int | None)
        assert_type(era.execute("node", "1", files={"a.js": ""}), ExecuteResult)
        with era.stream("node", "1") as running:
            for event in running:
                assert_type(event, RunEvent)
            assert_type(running.result, ExecuteResult)
        assert_type(era.storage.kv.get("n", "k"), str | None)
        assert_type(era.storage.d1.query("n", "SELECT 1", [1]), list[dict[str, Any]])
        try:
            era.sessions.get("none")
        except NotFound as error:
            assert_type(error.code, str)
        except EraError as error:
            assert_type(error.retry_after, int | None)


async def waiting() -> None:
    async with AsyncEra() as era, era.session("python", ttl=60) as session:
        assert_type(session, AsyncSession)
        assert_type(await session.run("1"), RunResult)
        async with await session.stream("1") as stream:
            async for event in stream:
                assert_type(event, RunEvent)
        assert_type(await session.data.get("n"), Any)
        assert_type(await session.files.read("a"), bytes)
        other = await era.session("node")
        assert_type(other, AsyncSession)
        await session.run("1", tiemout=3)  # type: ignore[call-overload]  # misspelt
        await era.session("python", dta={})  # type: ignore[call-arg]  # misspelt
