"""Packages that a session's own programs install: they last as packages, and are none of its files."""

from __future__ import annotations

import io
import json
import tarfile
from typing import Any

import httpx
import pytest

from tests.api.capsule_api import export_capsule, import_capsule
from tests.api.setups import make, settled
from tests.conftest import MakeServer, MakeSession, Run
from tests.gvisor import needs_gvisor, of_kind
from tests.packages.registry import wheel
from tests.soaking import soak_the_rest

WHEEL = "wheels/mine-1.0-py3-none-any.whl"
INSTALL = "pip install --no-index --find-links wheels mine"
PYTHON_INSTALLS = f"""
import subprocess
subprocess.run({INSTALL!r}, shell=True, check=True, stdout=subprocess.DEVNULL)
import mine
print(mine.x)
"""
USES = "import mine, subprocess; print(mine.x, subprocess.run('mine-says', stdout=-1).stdout)"
USED = "1 b'said\\n'\n"
EVERYHOW = """
import subprocess
for env in (None, {}):
    for options in ([], ['-I'], ['-E', '-s']):
        for python in ('python3', '/usr/bin/env python3', __import__('sys').executable):
            command = [*python.split(), *options, '-c', 'import mine, sys; print(mine.x)']
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            assert done.stdout == '1\\n', (command, env, done)
print('all of them')
"""
NODE_INSTALLS = """
const { execSync } = require('node:child_process');
execSync('npm install --offline ./thing-1.0.0.tgz', { stdio: 'pipe' });
console.log(require('thing'));
"""


def put_wheel(client: httpx.Client, where: str) -> None:
    """Have a wheel of `mine` among the session's files."""
    entry_points = "[console_scripts]\nmine-says = mine:says\n"
    files = {"mine.py": "x = 1\ndef says(): print('said')\n", "mine-1.0.dist-info/entry_points.txt": entry_points}
    assert client.put(f"/api/sessions/{where}/files/{WHEEL}", content=wheel("mine", files)).is_success


def shown(client: httpx.Client, where: str) -> tuple[list[str], int, int]:
    """The session's files as listed, and how many there are by the session and by its archive."""
    listed = [each["path"] for each in client.get(f"/api/sessions/{where}/files").json()["files"]]
    counted: int = client.get(f"/api/sessions/{where}").json()["file_count"]
    with tarfile.open(fileobj=io.BytesIO(client.get(f"/api/sessions/{where}/archive").content)) as archive:
        return listed, counted, sum(not member.isdir() for member in archive)


@pytest.mark.parametrize("isolation", ["bubblewrap", pytest.param("gvisor", marks=[needs_gvisor, pytest.mark.soak])])
def test_what_pip_installs_lasts(client: httpx.Client, session: MakeSession, run: Run, isolation: str) -> None:
    where = session(**of_kind(isolation))
    put_wheel(client, where)
    outcome = run(where, PYTHON_INSTALLS, timeout=90)
    assert (outcome["stdout"], outcome["status"]) == ("1\n", "ok"), outcome
    assert shown(client, where) == ([WHEEL], 1, 1)
    assert run(where, USES)["stdout"] == USED
    assert run(where, USES, env={"PYTHONHASHSEED": "1"})["stdout"] == USED
    assert run(where, EVERYHOW, timeout=90)["stdout"] == "all of them\n"
    # In another sandbox, too: that of a copy, which is made from what is stored.
    copy = client.post(f"/api/sessions/{where}/duplicate", json={}).json()["id"]
    outcome_of_copy = run(copy, USES)
    assert outcome_of_copy["stdout"] == USED, outcome_of_copy
    # It goes and comes with versions.
    version = outcome["state"]["version"]
    for to, status in ((version - 1, "failed"), (version, "ok")):
        assert client.post(f"/api/sessions/{where}/rollback", json={"version": to}).is_success
        assert run(where, USES)["status"] == status
    again = run(where, "import subprocess; subprocess.run(['pip', 'uninstall', '-y', 'mine'], check=True)", timeout=90)
    assert again["status"] == "ok", again
    assert run(where, USES)["status"] == "failed"


def test_what_npm_installs_lasts(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session("node")
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as archive:
        for name, text in {
            "package.json": json.dumps({"name": "thing", "version": "1.0.0"}),
            "index.js": "module.exports = 7",
        }.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    client.put(f"/api/sessions/{where}/files/thing-1.0.0.tgz", content=written.getvalue())
    outcome = run(where, NODE_INSTALLS, timeout=90)
    assert (outcome["stdout"], outcome["status"]) == ("7\n", "ok"), outcome
    files = ["package-lock.json", "package.json", "thing-1.0.0.tgz"]
    assert shown(client, where) == (files, 3, 3)
    copy = client.post(f"/api/sessions/{where}/duplicate", json={}).json()["id"]
    for each in (where, copy):
        assert run(each, "console.log(require('thing'))")["stdout"] == "7\n"
    again = "require('node:child_process').execSync('rm -r node_modules && npm ci --offline'); " + NODE_INSTALLS
    assert run(where, again, timeout=90)["stdout"] == "7\n"


@pytest.mark.parametrize("language", soak_the_rest(["python", "node"], 1))
def test_a_command_of_a_setup_installs_for_every_run(client: httpx.Client, run: Run, language: str) -> None:
    where = make(client, {"commands": [f"if [ -d wheels ]; then {INSTALL}; fi"]}, language)
    settled(client, where)
    put_wheel(client, where)
    assert client.post(f"/api/sessions/{where}/setup").is_success
    settled(client, where)
    code = "const { execSync } = require('child_process'); console.log(String(execSync('mine-says')))"
    outcome = run(where, "import mine; mine.says()" if language == "python" else code)
    assert outcome["stdout"].strip() == "said", outcome
    assert shown(client, where) == ([WHEEL], 1, 1)


def test_a_capsule_has_them(client: httpx.Client, session: MakeSession, run: Run, own_server: MakeServer) -> None:
    where = session()
    put_wheel(client, where)
    assert run(where, PYTHON_INSTALLS, timeout=90)["status"] == "ok"
    capsule = export_capsule(client, where)
    with own_server().client() as elsewhere:
        moved = import_capsule(elsewhere, capsule)["id"]
        assert shown(elsewhere, moved) == ([WHEEL], 1, 1)
        answer: dict[str, Any] = elsewhere.post(f"/api/sessions/{moved}/run", json={"code": USES}).json()
        assert answer["stdout"] == USED


def test_an_editable_project_is_found(client: httpx.Client, session: MakeSession, run: Run) -> None:
    """By a `.pth` file, which is acted upon in every program as if it had started from nothing."""
    where = session()
    code = """
import site, os
os.makedirs('project', exist_ok=True)
open('project/editable.py', 'w').write('x = 2')
path = site.getsitepackages()[0] + '/editable.pth'
open(path, 'w').write('/workspace/project\\nimport builtins; builtins.hooked = True\\n')
"""
    assert run(where, code)["status"] == "ok"
    for env in ({}, {"PYTHONHASHSEED": "1"}):
        assert run(where, "import editable; print(editable.x, hooked)", env=env)["stdout"] == "2 True\n"
