"""Inspect's own checks of sandboxes, on real sessions. docs/adapters.md has a whole task, which `make soak` runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace

import pytest

pytest.importorskip("inspect_ai", reason="needs inspect-ai, which scripts/setup --test installs where it can")

from inspect_ai.util import SandboxUnavailableError
from inspect_ai.util._sandbox import self_check
from inspect_ai.util._sandbox.self_check import *  # noqa: F403

from era import AsyncEra, Era
from era.adapters.inspect_ai import EraSandboxConfig, EraSandboxEnvironment
from tests.conftest import Server

pytest.mark.soak(self_check.test_read_and_write_large_file_binary)  # others read and write binary files, too

NOT_HERE = {"test_exec_as_user": "programs of a session have one user"}


@pytest.fixture(scope="module")
def live_session(shared_server: Server) -> Iterator[str]:
    """The id of one session for all checks, which only need a sandbox."""
    with Era(shared_server.url) as era, era.session("python") as session:
        session.process(["sleep", "infinity"])
        yield session.id


@pytest.fixture
async def sandbox_env(
    shared_server: Server, live_session: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[EraSandboxEnvironment]:
    if reason := NOT_HERE.get(request.node.originalname):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))

    # Their checks give a killed process five seconds to go. Ours is dead when the timeout is told, so they needn't.
    async def at_once(seconds: float) -> None:
        pass

    monkeypatch.setattr(self_check, "anyio", SimpleNamespace(sleep=at_once))
    async with AsyncEra(shared_server.url) as era:
        yield EraSandboxEnvironment(era, await era.sessions.get(live_session))


async def test_what_was_left_behind_is_deleted(shared_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERA_URL", shared_server.url)
    environment = await EraSandboxEnvironment.open("left", EraSandboxConfig())
    connection = await environment.connection()
    assert connection.command.startswith("era shell ")
    async with AsyncEra() as era:
        others = {each.id for each in await era.sessions.infos()} - {connection.container}
        await EraSandboxEnvironment.cli_cleanup(None)
        assert {each.id for each in await era.sessions.infos()} == others
    with pytest.raises(SandboxUnavailableError, match="There is no session"):
        await environment.exec(["true"])
    await environment.close()
