"""Secrets of processes beside runs: each has its own, and others reach the same hosts without them."""

from __future__ import annotations

from tests.api.live import output, process, start
from tests.conftest import eventually
from tests.network.conftest import NewSession
from tests.network.test_secrets import CLIENTS, SAID, SECRETS, VALUE

ASK = """
import os, time, urllib.request
for _ in range(5):
    print(urllib.request.urlopen('https://api.example.test/users/mina', timeout=20).status, flush=True)
    time.sleep(0.1)
"""


def test_a_process_has_its_secrets_and_others_reach_the_same_host(session: NewSession) -> None:
    """The other one has no secrets, but what it sends to that host passes the same way, and it trusts that."""
    one = session()
    stays = CLIENTS["python"] + "import sys, time; sys.stdout.flush(); time.sleep(1000)"
    mine = start(one.client, one.id, ["python3", "-c", stays], secrets=SECRETS)
    assert eventually(lambda: process(one.client, one.id, mine)["output_bytes"] == len(SAID))
    other = start(one.client, one.id, ["python3", "-c", ASK])
    assert output(one.client, one.id, other) == b"200\n" * 5
    one.client.delete(f"/api/sessions/{one.id}/processes/{mine}")
    assert output(one.client, one.id, mine).decode() == SAID
    assert VALUE not in str(process(one.client, one.id, mine))


def test_a_process_keeps_its_secrets_when_the_allowlist_is_another(session: NewSession) -> None:
    one = session()
    waits = "import os, time\nprint(end='x', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.01)\n"
    mine = start(one.client, one.id, ["python3", "-c", waits + CLIENTS["python"]], secrets=SECRETS)
    assert eventually(lambda: process(one.client, one.id, mine)["output_bytes"] == 1)
    one.change(egress={"allow": ["*.example.test"]})
    one.says("open('go', 'w').close()")
    assert output(one.client, one.id, mine).decode() == "x" + SAID
