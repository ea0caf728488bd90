"""smolagents with a scripted model, and an executor that works in a real session's context."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("smolagents", reason="needs smolagents, which scripts/setup --test installs where it can")

from PIL.Image import Image
from smolagents import AgentError, ChatMessage, CodeAgent, FinalAnswerTool, MessageRole, Model, tool

from era import Era
from era.adapters.smolagents import SessionExecutor
from era.sdk.answers import RunResult
from tests.adapters.answers import CUT_OFF, NOTES
from tests.conftest import Server


@pytest.fixture(scope="module")
def executor(shared_server: Server) -> Iterator[SessionExecutor]:
    """One for all tests, since its interpreter takes a while to start."""
    with Era(shared_server.url) as era, era.session("python") as session:
        yield SessionExecutor(session, timeout=60)


@tool
def twice(number: int) -> int:
    """Twice a number.

    Args:
        number: Any.
    """
    return 2 * number


class Scripted(Model):
    """A model that takes these steps, whatever it is told."""

    def __init__(self, *steps: str) -> None:
        super().__init__()
        self.steps = list(steps)
        self.told: list[str] = []

    def generate(self, messages: list[ChatMessage], **options: Any) -> ChatMessage:
        self.told.append(str(messages[-1].content))
        return ChatMessage(role=MessageRole.ASSISTANT, content=f"<code>\n{self.steps.pop(0)}\n</code>")


def test_an_agent_works_in_a_session(executor: SessionExecutor) -> None:
    """Variables and files stay between its steps, tools are in the sandbox, an error is told and the work goes on."""
    model = Scripted(
        "n = twice(start)\nprint('n is', n)", "open('n', 'w').write(str(n))\n1/0", "final_answer(open('n').read())"
    )
    agent = CodeAgent(tools=[twice], model=model, executor=executor, verbosity_level=0)
    assert agent.run("Work.", additional_args={"start": 21}) == "42"
    assert "n is 42" in model.told[1]
    assert "ZeroDivisionError" in model.told[2]


def test_what_a_step_gives(executor: SessionExecutor) -> None:
    executor.send_variables({"given": {"a": [1, 2, None]}})
    assert executor("given['a'][1]").output == "2"
    assert executor("x = 1").output is None
    answer = executor("print('out')\n'value'")
    assert (answer.output, answer.logs, answer.is_final_answer) == ("'value'", "out\n", False)
    picture = executor("import zlib, struct\n" + PICTURE).output
    assert isinstance(picture, Image)
    assert picture.size == (1, 1)


def test_the_final_answer_is_data(executor: SessionExecutor) -> None:
    executor.send_tools({"final_answer": FinalAnswerTool()})
    final = executor("print('so')\nfinal_answer({'n': [1, 2.5, 'x', None]})")
    assert (final.output, final.logs, final.is_final_answer) == ({"n": [1, 2.5, "x", None]}, "so\n", True)


def test_a_pickle_from_the_sandbox_is_not_loaded(executor: SessionExecutor) -> None:
    lie = "class FinalAnswerException(Exception): pass\nraise FinalAnswerException('pickle:gASVBQAAAAAAAACMAXiULg==')"
    with pytest.raises(Exception, match="Pickle data rejected"):
        executor(lie)


def test_what_fails_is_told(executor: SessionExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AgentError, match=r"(?s)before.*NameError"):
        executor("print('before')\nnone_such")
    monkeypatch.setattr(executor, "_timeout", 0.5)
    with pytest.raises(AgentError, match="KeyboardInterrupt"):
        executor("import time\ntime.sleep(60)")


def test_a_failed_install_is_told(executor: SessionExecutor) -> None:
    with pytest.raises(AgentError, match=r"(?s)Invalid requirement.*pip ended with 1"):
        executor.install_packages(["./no-such-directory"])


def test_it_is_cleaned_up_where_nothing_is_left(shared_server: Server) -> None:
    with Era(shared_server.url) as era:
        with era.session("python") as session:
            executor = SessionExecutor(session)
            executor.cleanup()
        executor.cleanup()


def test_what_is_missing_is_told(executor: SessionExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(**fields: Any) -> str:
        result = RunResult(CUT_OFF | fields)
        monkeypatch.setattr(executor, "_context", SimpleNamespace(run=lambda code, **options: result))
        return str(executor("1").logs)

    assert step() == "\n".join(["out", "err", *NOTES])
    assert step(stdout="", stderr="") == "\n".join(NOTES)
    for failed in ({"status": "timeout"}, {"error": {"name": "E", "value": "", "traceback": ""}}):
        with pytest.raises(AgentError) as raised:
            step(**failed)
        assert "\n".join(NOTES) in str(raised.value)


PICTURE = """
def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
class Dot:
    def _repr_png_(self):
        head = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
        body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\\0\\0")) + chunk(b"IEND", b"")
        return b"\\x89PNG\\r\\n\\x1a\\n" + body
Dot()
"""
