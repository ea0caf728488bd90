"""Packages that are built in a sandbox, restored from blobs, and pinned by capsules, over HTTP."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import httpx
import pytest

from tests.api.setups import environment, make, settled
from tests.conftest import MakeServer, Server
from tests.packages.builds import sdist
from tests.packages.registry import Registry, put_evil_npm, serving, wheel
from tests.soaking import soak_the_rest


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """An empty registry, which the service that the test starts will use."""
    with serving() as registry:
        for name, value in registry.environment().items():
            monkeypatch.setenv(name, value)
        yield registry


def stdout_of(client: httpx.Client, where: str, code: str) -> str:
    """What code prints in a session."""
    answer = client.post(f"/api/sessions/{where}/run", json={"code": code, "timeout": 60})
    return str(answer.json().get("stdout", answer.text))


def setup_events(client: httpx.Client, where: str) -> str:
    """The events of a session's setup until its end, as text."""
    return client.get(f"/api/sessions/{where}/setup/events", timeout=60).text


def lose_package_sets(server: Server, *, archives: bool) -> None:
    """Lose all package sets of this server, with `archives` also their archives in the blobs."""
    digests = [path.name for path in (server.data_dir / "environments").iterdir() if len(path.name) == 64]
    assert digests
    for digest in digests:
        shutil.rmtree(server.data_dir / "environments" / digest)
        if archives:
            (server.content_dir / "blobs" / digest[:2] / digest).unlink()


@pytest.mark.parametrize("uid", soak_the_rest([54_323, None], 1), ids=["ordinary user", "own user"])
def test_packages_are_built_in_a_sandbox_and_restored_from_blobs(
    own_server: MakeServer, registry: Registry, uid: int | None
) -> None:
    registry.put_python("made", "made-1.0.tar.gz", sdist("made", "print('at work'); files['made.py'] = 'x = 1'"))
    registry.put_python("broken", "broken-1.0.tar.gz", sdist("broken", "raise SystemExit('no compiler, say')"))
    put_evil_npm(registry, {"scripts": {"install": "echo built > built.txt"}})
    server = own_server(uid=uid if os.getuid() == 0 else None)
    with server.client() as client:
        setup = {"pip": ["made"], "npm": ["evil"]}
        first, second = (make(client, setup, allowInternetAccess=access) for access in (True, False))
        heard = setup_events(client, first)
        assert "done in a sandbox" in heard
        assert "Building made==1.0" in heard
        settled(client, first)
        code = "import made, os; print(made.x, open('/node_modules/evil/built.txt').read(), os.listdir('.'))"
        assert stdout_of(client, first, code).startswith("1 built\n")
        assert settled(client, second)["setup_result"]["pip_packages"] == ["made==1.0"]
        digests = {environment(client, where)["environment"] for where in (first, second)}
        assert len(digests) == 2, "each has its own"
        third = make(client, {"pip": ["broken"]})
        error = settled(client, third, "failed")["setup_result"]["error"]
        assert "can't be built here" in error
        assert "no compiler, say" in error
        assert stdout_of(client, third, "print('usable')") == "usable\n"
        # A package set that is lost is restored from the blobs before the next run, without a request to the registry.
        lose_package_sets(server, archives=False)
        requests = len(registry.asked)
        assert environment(client, second)["pip"] == [{"name": "made", "version": "1.0"}]
        assert stdout_of(client, second, "import made; print(made.x)") == "1\n"
        assert len(registry.asked) == requests
        assert environment(client, second)["environment"] in digests
        # If the blobs have lost it too, it is installed once more.
        copy = client.post(f"/api/sessions/{second}/duplicate", json={}).json()["id"]
        lose_package_sets(server, archives=True)
        answer = client.post(f"/api/sessions/{copy}/run", json={"code": "import made; print(made.x)"})
        assert answer.status_code == 503, answer.text
        assert "installed once more" in answer.json()["error"]
        assert stdout_of(client, copy, "import made; print(made.x)") == "1\n"
        assert len(registry.asked) > requests


@pytest.mark.one_host("the host that is asked to import installs the packages, with what it remembers of them")
def test_a_capsule_pins_the_versions_of_packages(own_server: MakeServer, registry: Registry) -> None:
    for version in ("1.0", "2.0"):
        file = f"one-{version}-py3-none-any.whl"
        registry.put_python("one", file, wheel("one", {"one.py": f"x = {version}"}, version=version))
        if version == "1.0":
            old_page = registry.pages["/simple/one/"]
    both, registry.pages["/simple/one/"] = registry.pages["/simple/one/"], old_page
    server = own_server()
    with server.client() as client:
        where = make(client, {"pip": ["one"]})
        settled(client, where)
        whole = client.get(f"/api/sessions/{where}/capsule").content
        registry.pages["/simple/one/"] = both
        shutil.rmtree(server.data_dir / "cache/uv")
        settled(client, newer := make(client, {"pip": ["one", "one>=1"]}))
        assert stdout_of(client, newer, "import one; print(one.x)") == "2.0\n"

        def imported(name: str) -> str:
            kind = {"Content-Type": "application/x-tar"}
            answer = client.post(f"/api/sessions/import?id={name}", content=whole, headers=kind)
            assert answer.status_code == 201, answer.text
            return str(settled(client, name)["setup_result"]["stderr"])

        assert imported("same") == ""
        assert stdout_of(client, "same", "import one; print(one.x)") == "1.0\n"
        # If that version can't be had any more, the result says so.
        del registry.pages["/files/one-1.0-py3-none-any.whl"]
        registry.pages["/simple/one/"] = both.replace(old_page, b"<!DOCTYPE html>")
        for note in (server.data_dir / "environments/asked").iterdir():
            note.unlink()
        shutil.rmtree(server.data_dir / "cache/uv")
        body = imported("other")
        assert "aren't all the very packages" in body
        assert "one==1.0" in body
        assert stdout_of(client, "other", "import one; print(one.x)") == "2.0\n"
