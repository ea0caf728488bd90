"""A run that asks for names as fast as it can, and what of that reaches the machine's nameserver."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest

from tests.gvisor import BOTH_KINDS
from tests.network.conftest import Machine, new_session

SECONDS = 4
A_SECOND = 5

SLOW = f"from era.network import dns; dns._PER_SECOND = {A_SECOND}"
"""The bound as it is, for a smaller number."""

UNBOUND = "import asyncio; from era.network import dns; dns._Pace.step = lambda self: asyncio.sleep(0)"

ASKS = f"""
import socket, time
server = open("/etc/resolv.conf").read().split()[1]
until = time.monotonic() + {SECONDS}
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.connect((server, 53))
sock.settimeout(0.02)
number = 0
while time.monotonic() < until:
    number += 1
    question = b"\\x07example\\x04test\\x00\\x00\\x01\\x00\\x01"
    sock.send(number.to_bytes(2) + b"\\x01\\x00\\x00\\x01" + bytes(6) + question)
    try: sock.recv(1000)
    except TimeoutError: pass
print(number)
"""
HEARD = "import json, urllib.request as u; print(len(json.load(u.urlopen('http://example.test/messages', timeout=30))))"


@pytest.mark.soak
@pytest.mark.parametrize("kind", BOTH_KINDS)
@pytest.mark.parametrize("weakness", [SLOW, UNBOUND], ids=["bounded", "not bounded"])
def test_a_run_asks_the_nameserver_so_often(machine: Machine, tmp_path: Path, kind: str, weakness: str) -> None:
    server = machine.serve(tmp_path / "data", weakness=weakness)
    with server.client() as client:
        session = new_session(client, isolation=kind)
        before = int(session.says(HEARD))
        begun = time.monotonic()
        asked = int(session.says(ASKS))
        most = A_SECOND * (time.monotonic() - begun + 1) + 1
        heard = int(session.says(HEARD)) - before
        assert asked > 2 * most, "this attack is none"
        # The programs that look ask for a name, too: for two addresses, and once more where an answer is late.
        assert (heard <= most + 8) == (weakness == SLOW), (asked, heard, most)
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
    server.stop()
