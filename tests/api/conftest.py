"""Fixtures of the tests over HTTP: a browser, sessions that can be called from outside, two owners on one server."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.guest_servers import HTTP_SERVER, serve_in_background
from tests.api.owners import OPERATOR_KEY, Owners
from tests.api.stored_code import Publish
from tests.browser import browser
from tests.conftest import MakeSession, Server, assert_nothing_left, mounts

__all__ = ["browser"]


@pytest.fixture
def host_directory() -> Iterator[Path]:
    """A directory of the host whose path is as long as `/workspace`, as interpreters wrap lines by length."""
    path = Path(f"/tmp/{secrets.token_hex(3)[:5]}")
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def publish(client: httpx.Client, session: MakeSession) -> Publish:
    """Makes a session that stores code; returns the path of its public URL, without a slash at its end."""

    def make(code: str | None, language: str = "python", **fields: Any) -> str:
        where = session(language, **fields)
        if code is not None:
            assert client.put(f"/api/sessions/{where}/code", json={"code": code}).status_code == 200
        return f"/proxy/{where}/3000"

    return make


@pytest.fixture
def live(client: httpx.Client, session: MakeSession) -> str:
    """The path of the public URL of a session with a live server, without a slash at its end."""
    where = session()
    serve_in_background(client, where, HTTP_SERVER)
    return f"/proxy/{where}/3000"


@pytest.fixture(scope="module")
def owners(tmp_path_factory: pytest.TempPathFactory, kind_of_server: type[Server]) -> Iterator[Owners]:
    """Two owners on a server of their own. At the end nothing of it may be left."""
    before, data_dir = mounts(), tmp_path_factory.mktemp("owners") / "data"
    server = kind_of_server(data_dir, {"ERA_API_KEY": OPERATOR_KEY}).start()
    owners = Owners.of(server)
    yield owners
    owners.close()
    processes = server.descendants()
    assert server.stop() == 0
    assert "Traceback" not in server.log, server.log
    assert_nothing_left(before, processes, data_dir)
