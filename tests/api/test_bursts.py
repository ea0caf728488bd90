"""Runs of Node and TypeScript that come back to back, which two supervisors take in turns: nothing else differs."""

from __future__ import annotations

import os

import httpx
import pytest

from tests.api.live import start
from tests.conftest import MakeSession, Run, eventually
from tests.soaking import soak_the_rest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user has no templates, and no second supervisor")

_COUNTS = """
const fs = require('fs'), name = 'burst-LANGUAGE', { KVStorage } = require('./era_storage.js');
const data = JSON.parse(fs.readFileSync('.session_data.json', 'utf8'));
data.n = (data.n ?? 0) + 1;
fs.writeFileSync('.session_data.json', JSON.stringify(data));
(async () => {
  const stored = Number(await KVStorage.get(name, 'n') ?? 0) + 1;
  await KVStorage.set(name, 'n', String(stored));
  console.log(data.n, stored, fs.readdirSync('/tmp').length, fs.readlinkSync('/proc/self/ns/pid'));
  fs.writeFileSync('/tmp/left', '');
})();
"""
_MOST = 60


@pytest.mark.parametrize("language", soak_the_rest(["node", "typescript"], 1))
def test_a_burst_is_like_single_runs(client: httpx.Client, session: MakeSession, run: Run, language: str) -> None:
    where = session(language)
    namespaces: list[str] = []
    while len(set(namespaces)) < 2 or len(namespaces) < 6:
        assert len(namespaces) < _MOST, "supervisors don't take turns"
        *counted, namespace = run(where, _COUNTS.replace("LANGUAGE", language))["stdout"].split()
        namespaces.append(namespace)
        assert counted == [str(len(namespaces))] * 2 + ["0"]
    # Processes beside runs keep what is in scratch directories, whichever supervisor has the run.
    start(client, where, "touch /tmp/theirs; sleep 600")
    looks = "console.log(require('fs').existsSync('/tmp/theirs'), require('fs').readlinkSync('/proc/self/ns/pid'))"
    assert eventually(lambda: run(where, looks)["stdout"].startswith("true "))
    for _ in range(10):
        assert run(where, looks)["stdout"].startswith("true "), "a run has removed what belongs to a process"
