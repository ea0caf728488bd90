"""Programs that call services with what everybody calls them with: requests and axios, the real ones.

The packages are installed by a server in the real network. Others then serve what it leaves in the machine of these
tests, where no registry can be reached: equal setups find the packages there.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.setups import make, settled
from tests.conftest import Server
from tests.network.conftest import NEEDS_GVISOR, Machine, NetServer, Session, new_session
from tests.soaking import soak_the_rest

PYTHON_SETUP = {"pip": {"requirements": "requests"}}
NODE_SETUP = {"npm": ["axios"]}

REQUESTS = """
import json
import requests

# who is it?
response = requests.get('SCHEME://api.example.test/users/mina')
print(f"Answer: {response.status_code}")
print(f"Name: {response.json()['name']}")

# leave a note
note = {'title': 'Shelf', 'body': 'Painted green'}
response = requests.post('SCHEME://www.example.test/posts', json=note)
print(f"Note: {response.json()['id']}")

with open('.session_data.json', 'r') as f:
    session_data = json.load(f)
session_data['note'] = response.json()
with open('.session_data.json', 'w') as f:
    json.dump(session_data, f)
"""
AXIOS = """
const axios = require('axios');
const fs = require('fs');

async function main() {
  // who is it?
  const response = await axios.get('SCHEME://api.example.test/users/mina');
  console.log('Answer:', response.status);
  console.log('Name:', response.data.name);
  // leave a note
  const note = await axios.post('SCHEME://www.example.test/posts', { title: 'Shelf', body: 'Painted green' });
  console.log('Note:', note.data.id);
  const data = JSON.parse(fs.readFileSync('.session_data.json', 'utf8'));
  data.note = note.data;
  fs.writeFileSync('.session_data.json', JSON.stringify(data, null, 2));
}

main().catch(console.error);
"""
TYPED_AXIOS = """
import axios from 'axios';
import * as fs from 'fs';

interface Reader {
  name: string;
  login: string;
  public_repos: number;
}
interface Note {
  id: number;
  title: string;
}

async function visit(login: string): Promise<void> {
  const response = await axios.get<Reader>(
    `SCHEME://api.example.test/users/${login}`
  );
  console.log('Answer:', response.status);
  console.log('Name:', response.data.name);
  const note = await axios.post<Note>('SCHEME://www.example.test/posts', { title: 'Shelf', body: 'Painted green' });
  console.log('Note:', note.data.id);
  const data = JSON.parse(fs.readFileSync('.session_data.json', 'utf8'));
  data.note = note.data;
  fs.writeFileSync('.session_data.json', JSON.stringify(data, null, 2));
}

visit('mina').catch(console.error);
"""
CALLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "python": (REQUESTS, PYTHON_SETUP),
    "node": (AXIOS, NODE_SETUP),
    "typescript": (TYPED_AXIOS, NODE_SETUP),
}


@pytest.fixture(scope="module")
def installed(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data directory of a server that has installed the packages."""
    data_dir = tmp_path_factory.mktemp("installed") / "data"
    with machine.at_home():
        server = Server(data_dir).start()
        try:
            with server.client() as client:
                for one in [make(client, PYTHON_SETUP), make(client, NODE_SETUP, "node")]:
                    settled(client, one)
        finally:
            server.stop()
    return data_dir


@pytest.fixture(scope="module", params=soak_the_rest([None, 54323], 1), ids=["root", "user"])
def packed(
    machine: Machine, installed: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[NetServer]:
    """A server that was given that directory, and is where no registry can be reached."""
    data_dir, uid = tmp_path_factory.mktemp("packed") / "data", request.param
    shutil.copytree(installed, data_dir, symlinks=True)
    shutil.copy(machine.keys / "ca.pem", data_dir)
    if uid is not None:
        subprocess.run(["chown", "--recursive", "--no-dereference", f"{uid}:{uid}", str(data_dir)], check=True)
    server = machine.serve(data_dir, uid=uid, SSL_CERT_FILE=f"{data_dir if uid is None else '/mnt/data'}/ca.pem")
    yield server
    server.stop()


@pytest.fixture
def client(packed: NetServer) -> Iterator[httpx.Client]:
    with packed.client() as client:
        yield client


def has(client: httpx.Client, setup: dict[str, Any], language: str = "python", **fields: Any) -> Session:
    """A session with these packages."""
    one = new_session(client, language, setup=setup, **fields)
    settled(client, one.id)
    return one


def data_of(one: Session) -> dict[str, Any]:
    data: dict[str, Any] = one.client.get(f"/api/sessions/{one.id}").json()["data"]
    return data


CALLED = [
    pytest.param("http", "bubblewrap", marks=pytest.mark.soak),
    ("https", "bubblewrap"),
    pytest.param("https", "gvisor", marks=NEEDS_GVISOR),
]


@pytest.mark.parametrize("language", CALLERS)
@pytest.mark.parametrize(("scheme", "kind"), CALLED)
def test_calls_of_services(client: httpx.Client, machine: Machine, language: str, scheme: str, kind: str) -> None:
    code, setup = CALLERS[language]
    one = has(client, setup, language, isolation=kind)
    trust = {}
    if scheme == "https":
        client.put(f"/api/sessions/{one.id}/files/ca.pem", content=(machine.keys / "ca.pem").read_bytes())
        trust = dict.fromkeys(("REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"), "/workspace/ca.pem")
    outcome = one.run(code.replace("SCHEME", scheme), env=trust)
    assert (outcome["stdout"], outcome["stderr"]) == ("Answer: 200\nName: Mina\nNote: 101\n", "")
    assert outcome["exit_code"] == 0
    assert outcome["data"]["note"] == {"title": "Shelf", "body": "Painted green", "id": 101} == data_of(one)["note"]
    port = 443 if scheme == "https" else 80
    assert {(each["host"], each["port"], each["allowed"]) for each in one.destinations()} == {
        ("api.example.test", port, True),
        ("www.example.test", port, True),
    }


SECRETIVE = {
    "python": """
import os, requests
token = os.environ['TOKEN']
for scheme in ('https', 'http'):
    answer = requests.post(f'{scheme}://api.example.test/posts', json={'token': token}, auth=('me', token))
    print(answer.status_code, answer.json()['length'], answer.json()['token'] == token)
""",
    "node": """
const axios = require('axios');
const token = process.env.TOKEN;
(async () => {
  for (const scheme of ['https', 'http']) {
    const auth = { username: 'me', password: token };
    const answer = await axios.post(`${scheme}://api.example.test/posts`, { token }, { auth });
    console.log(answer.status, answer.data.length, answer.data.token === token ? 'True' : 'False');
  }
})();
""",
}


@pytest.mark.parametrize("language", SECRETIVE)
def test_with_a_secret(client: httpx.Client, language: str) -> None:
    one = has(client, CALLERS[language][1], language)
    token = {"value": "hunter2", "hosts": ["api.example.test"], "plain_http": True}
    outcome = one.says(SECRETIVE[language], secrets={"TOKEN": token})
    assert outcome == f"201 {len('hunter2')} True\n" * 2
    assert [(each["port"], each["secrets"]) for each in one.destinations()] == [(443, ["TOKEN"]), (80, ["TOKEN"])]
