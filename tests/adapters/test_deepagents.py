"""LangChain's own tests of sandboxes, and a deep agent with a scripted model, on a real session."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("deepagents", reason="needs deepagents, which scripts/setup --test installs where it can")

from deepagents import create_deep_agent
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_tests.integration_tests.sandboxes import SandboxIntegrationTests

from era import Era
from era.adapters.deepagents import ROOT, SessionBackend
from tests.conftest import Server


@pytest.fixture
def backend(server: Server) -> Iterator[SessionBackend]:
    with Era(server.url) as era, era.session("python") as session:
        yield SessionBackend(session, timeout=120)


class TestStandard(SandboxIntegrationTests):
    """The tests that every backend of deepagents should pass."""

    @pytest.fixture(scope="class")
    @classmethod
    def sandbox(cls, shared_server: Server) -> Iterator[SessionBackend]:
        with Era(shared_server.url) as era, era.session("python") as session:
            yield SessionBackend(session, timeout=120)

    @pytest.fixture(scope="class")
    @classmethod
    def sandbox_backend(cls, sandbox: SessionBackend) -> SessionBackend:
        return sandbox

    @property
    def sandbox_root_dir(self) -> str:
        return ROOT


THEIRS = (
    "test_glob",
    "test_glob_basic_pattern",
    "test_glob_with_character_class",
    "test_glob_with_directories",
    "test_glob_hidden_files_explicitly",
    "test_glob_with_question_mark",
    "test_write_existing_file_fails",
)
"""Tests of what deepagents' own base class does, which has changed since: glob gives whole paths, write overwrites."""

for _name in THEIRS:
    _mark = pytest.mark.xfail(reason="deepagents' base class does otherwise by now", strict=True)
    setattr(TestStandard, _name, _mark(getattr(SandboxIntegrationTests, _name)))


LARGE = (
    "test_aread_large_text_payload_paginated_roundtrip",
    "test_aupload_adownload_large_file_roundtrip",
    "test_awrite_aread_adownload_large_text_with_escaped_content",
    "test_write_read_download_large_text_with_escaped_content",
)
"""Their longest tests, of the same calls as others, with more in them."""

for _name in LARGE:
    setattr(TestStandard, _name, pytest.mark.soak(getattr(SandboxIntegrationTests, _name)))


class Scripted(GenericFakeChatModel):
    """A model that says what it is told to, whatever tools it is given."""

    def bind_tools(self, tools: Any, **options: Any) -> Scripted:
        return self


def test_an_agent_works_in_a_session(backend: SessionBackend) -> None:
    calls = [
        ("write_file", {"file_path": "/workspace/in/a.txt", "content": "12\n30\n"}),
        ("execute", {"command": "paste -sd+ in/a.txt | tr -d '\\n'; echo; echo no >&2; exit 3"}),
        ("read_file", {"file_path": "/workspace/in/a.txt"}),
    ]
    said = [
        AIMessage("", tool_calls=[{"name": name, "args": arguments, "id": f"call{number}"}])
        for number, (name, arguments) in enumerate(calls)
    ]
    agent = create_deep_agent(model=Scripted(messages=iter([*said, AIMessage("done")])), backend=backend)
    messages = agent.invoke({"messages": [("user", "Work.")]})["messages"]
    assert messages[-1].content == "done"
    written, executed, read = [str(message.content) for message in messages if message.type == "tool"]
    assert "/workspace/in/a.txt" in written
    assert "12+30\nno" in executed
    assert "3" in executed
    assert "30" in read
    assert backend.download_files(["/workspace/in/a.txt", "/etc/passwd", "x"])[0].content == b"12\n30\n"


def test_what_cannot_be_reached_says_so(backend: SessionBackend) -> None:
    backend.upload_files([("/workspace/d/f", b"")])
    errors = [
        answer.error for answer in backend.download_files(["/workspace/d", "/workspace/none", "/etc/passwd", "x"])
    ]
    assert errors == ["is_directory", "file_not_found", "permission_denied", "invalid_path"]
    assert backend.upload_files([("/workspace/../etc/x", b"")])[0].error == "invalid_path"
