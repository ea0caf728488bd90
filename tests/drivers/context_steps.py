"""Steps of the conformance suite with contexts: what is done with a sandbox, in whichever process that is."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from era import languages
from era.core.live import file_helper
from era.core.live.context import Context, NotBegun
from era.core.live.file_helper import HELPER, FileHelper, read_state, write_state
from era.core.process import ProcessSpec
from era.core.program import CellEvent, Invocation, Output, Program
from era.errors import CommitFailed


@dataclass
class Answer:
    """What a cell answered."""

    cause: str
    exit_code: int
    error: str | None
    lost: str | None
    texts: list[str]
    """The text of each result."""

    output: dict[str, str] = field(default_factory=lambda: {"stdout": "", "stderr": ""})


async def cells(sandbox: Any, language: str, codes: list[str | dict[str, Any]]) -> list[Answer]:
    """Execute cells in a context of a language, which ends then. A cell is its code, or what Cell takes."""
    kernel = languages.runtime(language).kernel
    assert kernel is not None
    supervisor = await sandbox.process_supervisor()
    process = await supervisor.start(ProcessSpec(kernel.command, kernel.environment, channel=True))
    context = Context("c", language, process, sandbox.cpu_seconds, sandbox.wants_processor)
    answers = []
    try:
        await context.ready()
        for given in codes:
            asked = {"code": given} if isinstance(given, str) else given
            try:
                answers.append(await _answer(context, asked))
            except NotBegun:
                break
        return answers
    finally:
        await context.close("The test is over.")


async def _answer(context: Context, asked: dict[str, Any]) -> Answer:
    answer = Answer("", 0, None, None, [])

    async def write(output: Output | CellEvent) -> None:
        if isinstance(output, Output):
            answer.output[output.stream] += output.data.decode()

    invocation = Invocation(stdin=asked.get("stdin", "").encode(), cwd=asked.get("cwd", ""))
    code, env, timeout = asked["code"].encode(), asked.get("env", {}), asked.get("timeout", 30.0)
    cell = Program(code, env=env, timeout=timeout, invocation=invocation)
    outcome = await context.execute(cell, 1 << 20, write)
    answer.cause, answer.exit_code, answer.lost = outcome.cause, outcome.exit_code, outcome.lost
    answer.error = None if outcome.error is None else outcome.error["name"]
    answer.texts = [str(result["data"].get("text/plain")) for result in outcome.results]
    return answer


async def state_file(sandbox: Any, before: list[str]) -> tuple[bytes | None, str | None, bytes | None]:
    """Write the state file, after each of the shell's commands in `before`; return what is read then, and what is read
    after it was written once more."""
    supervisor = await sandbox.process_supervisor()
    helpers: list[FileHelper] = []

    async def helper() -> FileHelper:
        if not helpers or not helpers[-1].alive:
            helpers.append(FileHelper(await supervisor.start(HELPER), sandbox.cpu_seconds))
        return helpers[-1]

    try:
        await write_state(helper, b'{"a": 1}')
        for command in before:
            process = await supervisor.start(ProcessSpec(["sh", "-c", command], {}))
            async for _ in process.events():
                pass
        if "STOP" in "".join(before):
            _give_up_one_question_soon()
        content, problem = await read_state(helper)
        await write_state(helper, b'{"b": 2}')
        return content, problem, (await read_state(helper))[0]
    except CommitFailed as error:
        return None, error.message, None
    finally:
        await helpers[-1].end()


def _give_up_one_question_soon() -> None:
    """Let the next question, to a helper that is stopped and never answers, be given up soon. All after it are waited
    for as long as ever."""
    seconds, file_helper._SECONDS = file_helper._SECONDS, 0.3
    asyncio.get_running_loop().call_soon(setattr, file_helper, "_SECONDS", seconds)
