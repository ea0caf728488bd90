"""An owner whose runs ask for more names than may be asked for at a time, and a neighbour who asks for one. Each attack
is also made on a server that is weakened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.api.owners import OPERATOR_KEY, client_with_key, new_key
from tests.conftest import eventually
from tests.gvisor import BOTH_KINDS
from tests.network import world
from tests.network.conftest import Machine, Session, new_session

EACH = 32
"""Lookups of one run at a time."""

FEW = """
from era.network import dns
dns._SECONDS = dns._TURN_SECONDS = 600
dns._ALL_LOOKUPS, dns._OWNER_LOOKUPS = 16, 8
"""
"""The bounds as they are, for smaller numbers and for nameservers that never answer."""

ONE_QUEUE = """
turn = dns.Lookups.turn
dns.Lookups.turn = lambda self, owner, sandbox_id: turn(self, "", "")
dns._OWNER_LOOKUPS = dns._ALL_LOOKUPS
"""
"""Whoever comes first has the first turn, whoever he is."""

UNBOUND = "dns._ALL_LOOKUPS = dns._OWNER_LOOKUPS = 1 << 20"

CONNECTED = """
import socket, struct, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.connect((open("/etc/resolv.conf").read().split()[1], 53))
def ask(number, *labels):
    name = b"".join(bytes([len(label)]) + label for label in labels) + b"\\0"
    sock.send(struct.pack("!HHHHHH", number, 256, 1, 0, 0, 0) + name + struct.pack("!HH", 1, 1))
"""
GREEDY = f"""{CONNECTED}
for number in range({2 * EACH}):
    ask(number, b"n%d-of-RUN" % number, b"silent", b"test")
time.sleep(600)
"""
ASKS = f"""{CONNECTED}
sock.settimeout(SECONDS)
ask(1, b"www", b"example", b"test")
try: print("answered" if sock.recv(1000)[:2] == b"\\0\\1" else "?")
except TimeoutError: print("nothing")
"""
HEARD = f"import urllib.request as u; print(u.urlopen('http://{world.PUBLIC}/queries', timeout=30).read().decode())"


def greedy_run(session: Session) -> None:
    """Begin a run that asks for more names than it may, none of which is ever answered."""
    fields = {"code": GREEDY.replace("RUN", session.id), "timeout": 600, "background": True}
    answer = session.client.post(f"/api/sessions/{session.id}/run", json=fields)
    assert answer.status_code == 202, answer.text


@pytest.mark.parametrize("kind", BOTH_KINDS)
@pytest.mark.parametrize(
    ("weakness", "asked", "patience", "answer"),
    [
        ("", 8, 60, "answered"),
        pytest.param(ONE_QUEUE, 16, 5, "nothing", marks=pytest.mark.soak),
        pytest.param(UNBOUND, 2 * EACH, 60, "answered", marks=pytest.mark.soak),
    ],
    ids=["", "one queue", "not bounded"],
)
def test_a_neighbours_name_is_found(
    machine: Machine, tmp_path: Path, kind: str, weakness: str, asked: int, patience: int, answer: str
) -> None:
    server = machine.serve(tmp_path / "data", weakness=FEW + weakness, ERA_API_KEY=OPERATOR_KEY, ERA_DRAIN_SECONDS="0")
    mallorys, hers = (client_with_key(server, new_key(server, owner)["key"]) for owner in ("mallory", "lovelace"))
    with mallorys, hers:
        greedy = [new_session(mallorys, isolation=kind) for _ in range(2)]
        neighbour = new_session(hers, isolation=kind)

        def heard() -> int:
            """How many questions of the greedy runs have reached the machine's nameserver."""
            names = json.loads(neighbour.says(HEARD))
            return sum(any(f"-of-{one.id}." in name for one in greedy) for name in names)

        for one in greedy:
            greedy_run(one)
        assert eventually(lambda: heard() >= asked), heard()
        assert neighbour.says(ASKS.replace("SECONDS", str(patience))).strip() == answer
        assert heard() == asked
    server.stop()
