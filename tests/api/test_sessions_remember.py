"""The main job: data and files outlive a run, and concurrent runs lose nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.conftest import MakeSession, Run
from tests.soaking import soak_the_rest

INCREMENT = """
import json
with open('.session_data.json') as f: data = json.load(f)
data['n'] = data.get('n', 0) + 1
with open('.session_data.json', 'w') as f: json.dump(data, f)
print(data['n'])
"""


def test_data_and_files_outlive_a_run(session: MakeSession, run: Run) -> None:
    where = session(data={"n": 41})
    first = run(where, INCREMENT + "open('note', 'w').write('kept')")
    assert (first["exit_code"], first["stdout"], first["data"]) == (0, "42\n", {"n": 42})
    assert first["state"] == {"version": 2, "committed": True, "reason": None}
    assert run(where, "print(open('note').read())")["stdout"] == "kept\n"


@pytest.mark.parametrize("clients", soak_the_rest([5, 50], 1))
def test_concurrent_increments_are_all_counted(client: httpx.Client, session: MakeSession, clients: int) -> None:
    where = session(data={"n": 0})

    def work(_: int) -> list[int]:
        with httpx.Client(base_url=client.base_url, timeout=120, trust_env=False, verify=False) as own:
            return [own.post(f"/api/sessions/{where}/run", json={"code": INCREMENT}).status_code for _ in range(20)]

    with ThreadPoolExecutor(clients) as pool:
        statuses = [status for batch in pool.map(work, range(clients)) for status in batch]
    assert set(statuses) == {200}
    assert client.get(f"/api/sessions/{where}").json()["data"] == {"n": clients * 20}
