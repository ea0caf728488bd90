"""Packages of sessions over HTTP: real ones, from the registries that this machine's pip and npm use."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import time
from functools import partial
from typing import Any

import httpx
import pytest

from era.wire.sessions import SessionAnswer
from tests.api.answers import checked, refused
from tests.api.setups import SETUP_KEYS, environment, make, settled
from tests.conftest import MakeServer, MakeSession, Run, Server, eventually, is_running
from tests.packages.registry import serving, wheel
from tests.table import table

HAS_SIX = "import importlib.util as u; s = u.find_spec('six'); print(bool(s) and s.origin.startswith('/opt/env/'))"
"""A program that prints whether six is of the session's packages."""


@pytest.fixture(scope="module")
def packages(shared_server: Server) -> dict[str, Any]:
    """The setup that most of these tests share, so that it is installed once."""
    return {"pip": ["six", "idna"], "npm": ["ms@2", "is-number"]}


def test_python_finds_its_packages(client: httpx.Client, run: Run, packages: dict[str, Any]) -> None:
    answer = client.post("/api/sessions", json={"language": "python", "setup": packages})
    created = checked(answer, SessionAnswer, SETUP_KEYS, 201)
    assert (created["setup"], created["setup_status"], created["setup_result"]) == (packages, "pending", None)
    where = created["id"]
    code = """
import os, subprocess, sys, six, idna
from importlib.metadata import version
print(six.__file__, idna.encode('ü.de'), version('six') == six.__version__)
print(sys.path.index(os.path.dirname(six.__file__)) > sys.path.index(os.path.dirname(os.__file__)))
for options, env in (([], None), ([], {}), (['-I'], {})):
    command = ['python3', *options, '-c', 'import six; print(six.__file__)']
    print(subprocess.run(command, env=env, capture_output=True, text=True).stdout.strip() == six.__file__)
print(subprocess.run(['idna', '--version'], capture_output=True).returncode)
"""
    outcome = run(where, code, timeout=250)  # the run waits for the setup
    assert outcome["exit_code"] == 0, outcome
    lines = outcome["stdout"].splitlines()
    assert re.fullmatch(r"/opt/env/lib/python3\.\d+/site-packages/six.py b'xn--tda.de' True", lines[0])
    assert lines[1:] == ["True", "True", "True", "True", "0"]
    found = settled(client, where)
    result = found["setup_result"]
    names = [name.partition("==")[0] for name in result["pip_packages"]]
    assert names == ["idna", "six"]
    assert {name.rpartition("@")[0] for name in result["npm_packages"]} == {"ms", "is-number"}
    assert (result["go_modules"], result["commands_run"], result["error"]) == ([], [], None)
    assert result["duration_ms"] >= 0
    listed = environment(client, where)
    assert [f"{item['name']}=={item['version']}" for item in listed["pip"]] == result["pip_packages"]
    # Cold starts find them too.
    assert run(where, HAS_SIX, env={"PYTHONHASHSEED": "1"})["stdout"] == "True\n"


def test_files_of_the_session_win_over_packages(client: httpx.Client, run: Run, packages: dict[str, Any]) -> None:
    where = make(client, packages)
    assert client.put(f"/api/sessions/{where}/files/six.py", content=b"mine = 1").is_success
    assert run(where, "import six; print(six.mine)", timeout=250)["stdout"] == "1\n"
    outcome = run(where, "import app.part", timeout=250)
    assert "No module named 'app'" in outcome["stderr"]
    client.put(f"/api/sessions/{where}/files/app/part.py", content=b"import idna; print(idna.__name__)")
    assert run(where, "import app.part")["stdout"] == "idna\n"


@table("language", ["node", "typescript"])
def test_node_finds_its_packages(client: httpx.Client, run: Run, packages: dict[str, Any], language: str) -> None:
    where = make(client, packages, language)
    typed = ": string" if language == "typescript" else ""
    code = f"const a{typed} = require('ms')(60000, {{long: true}}); console.log(a, require('is-number')(5));"
    assert run(where, code, timeout=250)["stdout"] == "1 minute true\n"
    code = (
        f"import ms from 'ms'; import number from 'is-number'; const a{typed} = ms(1000); console.log(a, number('x'))"
    )
    assert run(where, code)["stdout"] == "1s false\n"
    extension = "ts" if language == "typescript" else "mjs"
    file = f"src/part.{extension}"
    client.put(f"/api/sessions/{where}/files/{file}", content=b"import ms from 'ms'; export const text = ms(2000);")
    assert run(where, f"const {{ text }} = await import('./{file}'); console.log(text)")["stdout"] == "2s\n"
    code = "console.log(require('child_process').execFileSync('node', ['-p', 'require(\"ms\")(3000)']).toString())"
    assert run(where, code)["stdout"] == "3s\n\n"
    assert run(where, "console.log(require('ms')(4))", env={"NODE_OPTIONS": "--no-warnings"})["stdout"] == "4ms\n"


@table("setup, language, code, said", [
        ({"pip": {"requirements": "requests"}}, "python", "import requests; print(requests.codes.ok)", "200\n"),
        ({"pip": {"requirements": "six\nidna\n"}}, "python", "import six, idna; print('both')", "both\n"),
        ({"pip": {"requirements": "six idna>=3"}}, "python", "import six, idna; print('both')", "both\n"),
        (
            {"npm": {"packageJson": '{"dependencies": {"ms": "^2.1.0"}, "scripts": {"postinstall": "exit 1"}}'}},
            "node", "console.log(require('ms/package.json').version[0])", "2\n",
        ),
        ({"npm": ["axios"]}, "typescript", "import axios from 'axios'; console.log(typeof axios.post)", "function\n"),
    ])  # fmt: skip
def test_forms_of_a_setup(
    client: httpx.Client, run: Run, setup: dict[str, Any], language: str, code: str, said: str
) -> None:
    where = make(client, setup, language)
    outcome = run(where, code, timeout=250)
    assert outcome["stdout"] == said, (outcome, settled(client, where))


@table(
    "setup, words",
    [
        ({"pip": ["era-has-no-such-package"]}, ["no such package", "era-has-no-such-package"]),
        ({"pip": ["six==1.16.0", "six==1.17.0"]}, ["can't go together", "six==1.16.0"]),
        ({"npm": ["era-has-no-such-package"]}, ["no such package", "era-has-no-such-package"]),
    ],
)
def test_what_cannot_be_installed_fails_and_says_why(
    client: httpx.Client, run: Run, setup: dict[str, Any], words: list[str]
) -> None:
    where = make(client, setup)
    result = settled(client, where, "failed")["setup_result"]
    assert [word for word in words if word not in result["error"]] == [], result
    assert len(result["error"]) < 8192
    assert (result["pip_packages"], result["npm_packages"]) == ([], [])
    assert environment(client, where)["environment"] is None
    outcome = run(where, "print('still usable')")
    assert outcome["stdout"] == "still usable\n"
    assert (outcome["setup_status"], outcome["setup_error"][:400]) == ("failed", result["error"][:400])


@table(
    "setup",
    [
        {"go": ["example.com/x@main"]},
        {"go": ["../x"]},
        {"go": {"goMod": "replace a.b/c => /etc"}},
        {"pip": ["-r /etc/passwd"]},
        {"pip": ["six @ file:///tmp/x.whl"]},
        {"pip": {"requirements": "--index-url http://host/ six"}},
        {"pip": {"lines": "six"}},
        {"pip": "-r /etc/passwd"},
        {"pip": 6},
        {"npm": "ms@http://host/x.tgz"},
        {"go": "../x"},
        {"npm": ["ms@http://host/x.tgz"]},
        {"npm": {"packageJson": "{"}},
        {"gems": ["x"]},
        {"envs": {"A=B": "1"}},
        {"envs": {"A": 1}},
    ],
)
def test_invalid_setups_are_refused(client: httpx.Client, session: MakeSession, setup: Any) -> None:
    body = refused(client.post("/api/sessions", json={"language": "python", "setup": setup}), 400)
    assert "setup" in body["error"] or "env" in body["error"], body
    where = session()
    refused(client.patch(f"/api/sessions/{where}", json={"setup": setup}), 400)
    assert client.get(f"/api/sessions/{where}").json()["setup"] is None


def test_a_setup_is_changed_and_taken_away(client: httpx.Client, run: Run, session: MakeSession) -> None:
    where = session()
    refused(client.post(f"/api/sessions/{where}/setup"), 400, "no setup")
    listed = environment(client, where)
    assert (listed["setup_status"], listed["environment"], listed["pip"]) == (None, None, [])
    assert run(where, HAS_SIX)["stdout"] == "False\n"

    def change(setup: Any) -> dict[str, Any]:
        answer = client.patch(f"/api/sessions/{where}", json={"setup": setup})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()["metadata"]
        return found

    assert change({"pip": ["six"]})["setup_status"] == "pending"
    assert run(where, f"open('kept', 'w').write('1'); {HAS_SIX}", timeout=250)["stdout"] == "True\n"
    before = environment(client, where)
    assert change({"pip": ["idna"]})["setup_status"] == "pending"
    code = f"import idna; print(idna.__file__[:8], open('kept').read()); {HAS_SIX}"
    assert run(where, code, timeout=250)["stdout"] == "/opt/env 1\nFalse\n", "the old ones are gone, the files are not"
    assert environment(client, where)["environment"] != before["environment"]
    body = client.patch(f"/api/sessions/{where}", json={"default_timeout": 5}).json()["metadata"]
    assert body["setup_status"] == "completed", "other changes leave it alone"
    assert "setup_status" not in change(None)
    assert run(where, "import os; print(os.path.exists('/opt/env'))")["stdout"] == "False\n"


def test_packages_cannot_be_changed(client: httpx.Client, server: Server, run: Run, packages: Any) -> None:
    where = make(client, packages)
    code = """
import os, six
for path in (six.__file__, '/opt/env/new', '/opt/env/bin/idna', '/node_modules/ms/index.js', '/node_modules/evil.js'):
    for attempt in (lambda: open(path, 'w'), lambda: os.unlink(path), lambda: os.chmod(path, 0o777),
                    lambda: os.rename(path, path + '2'), lambda: os.symlink('/etc/passwd', path + '3')):
        try: attempt()
        except OSError: continue
        print('did it:', path)
print('tried')
"""
    assert run(where, code, timeout=250)["stdout"] == "tried\n"
    assert run(make(client, packages, "node"), "console.log(require('ms')(1000))", timeout=250)["stdout"] == "1s\n"


def test_known_packages_need_no_registry(own_server: MakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setup whose packages aren't known fails without a registry, and can be run again."""
    with serving() as registry:
        registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))
        for name, value in registry.environment().items():
            monkeypatch.setenv(name, value)
        server = own_server()
        with server.client() as client:
            known = make(client, {"pip": ["one"]})
            settled(client, known)
    with server.client() as client:
        again = make(client, {"pip": ["one"]})
        settled(client, again)
        assert environment(client, again)["environment"] == environment(client, known)["environment"]
        run = client.post(f"/api/sessions/{again}/run", json={"code": "import one; print(one.x)"})
        assert run.json()["stdout"] == "1\n"
        failed = [make(client, setup) for setup in ({"pip": ["two"]}, {"npm": ["two"]})]
        for where in failed:
            assert eventually(partial(has_failed, client, where), 300)
            error = client.get(f"/api/sessions/{where}").json()["setup_result"]["error"]
            assert "can't be reached" in error
        with serving(int(registry.url.rpartition(":")[2])) as registry:
            registry.put_python("two", "two-1.0-py3-none-any.whl", wheel("two", {"two.py": "x = 2"}))
            assert client.post(f"/api/sessions/{failed[0]}/setup").json()["setup_status"] == "pending"
            body = {"code": "import two; print(two.x)", "timeout": 250}
            run = client.post(f"/api/sessions/{failed[0]}/run", json=body)
            assert run.json()["stdout"] == "2\n", settled(client, failed[0])


def has_failed(client: httpx.Client, where: str) -> bool:
    return bool(client.get(f"/api/sessions/{where}").json()["setup_status"] == "failed")


def test_a_setup_that_was_cut_off_is_taken_up_again(own_server: MakeServer) -> None:
    server = own_server()
    with server.client() as client:
        where = make(client, {"pip": ["six"], "npm": ["ms"]})
        while not list((server.data_dir / "environments" / "making").iterdir()):
            time.sleep(0.005)
        processes = server.descendants()
        server.stop(signal.SIGKILL)
    assert eventually(lambda: not any(map(is_running, processes))), "tools die with the service"
    server.start()
    with server.client() as client:
        run = client.post(f"/api/sessions/{where}/run", json={"code": HAS_SIX, "timeout": 250})
        assert run.json()["stdout"] == "True\n"
        settled(client, where)
        assert eventually(lambda: list((server.data_dir / "environments" / "making").iterdir()) == [])
        digest = environment(client, where)["environment"]
    # A server that lost its package sets makes them anew.
    server.stop()
    shutil.rmtree(server.data_dir / "environments")
    server.start()
    with server.client() as client:
        run = client.post(f"/api/sessions/{where}/run", json={"code": HAS_SIX, "timeout": 250})
        assert run.json()["stdout"] == "True\n"
        assert environment(client, where)["environment"] == digest


def test_a_run_waits_for_a_setup_no_longer_than_its_timeout(
    own_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry accepts the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        server = own_server(setup_seconds="5")
        with server.client() as client:
            where = make(client, {"pip": ["six"]})
            begun = time.monotonic()
            answer = client.post(f"/api/sessions/{where}/run", json={"code": "1", "timeout": 0.5})
            body = refused(answer, 409, "under way", "setup_status")
            assert body["code"] == "setup_under_way", "after the setup's end it would have run"
            assert time.monotonic() - begun > 0.4
            assert client.get(f"/api/sessions/{where}/runs").json()["runs"] == []
            result = settled(client, where, "failed")["setup_result"]
            assert "too long" in result["error"]
            assert "ERA_SETUP_SECONDS" in result["error"]
            run = client.post(f"/api/sessions/{where}/run", json={"code": "print(1)"})
            assert run.json()["stdout"] == "1\n"
