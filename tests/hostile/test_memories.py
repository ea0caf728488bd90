"""Many warm sessions with many files each: what the service remembers of them together stays below a bound."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Server
from tests.gvisor import BOTH_KINDS

SESSIONS, FILES = 12, 4000
BOUND = "from era.core.trees import memory; memory.MOST_ENTRIES = {}"
FEW, UNBOUND = BOUND.format(2 * FILES + 1000), BOUND.format(1 << 40)
MANY = f"""
import os
for number in range({FILES}):
    if number % 100 == 0: os.makedirs(f'd{{number // 100}}', exist_ok=True)
    open(f'd{{number // 100}}/some-module-{{number}}.js', 'w').write('x')
"""
CHANGE = "open('d7/some-module-703.js', 'a').write('changed')\nimport os\nos.unlink('d8/some-module-803.js')"


@pytest.mark.soak
@pytest.mark.parametrize("kind", BOTH_KINDS)
@pytest.mark.parametrize("weakness", [FEW, UNBOUND], ids=["bounded", "not bounded"])
def test_trees_of_many_sessions(tmp_path: Path, kind: str, weakness: str) -> None:
    server = Server(tmp_path / "data", {"ERA_MAX_WARM": str(SESSIONS + 2)}, weakness=weakness)
    server.start()
    try:
        with server.client() as client:

            def run(name: str, code: str) -> str:
                done = client.post(f"/api/sessions/{name}/run", json={"code": code}).json()
                assert done.get("status") == "ok", done
                assert done["state"]["committed"], done
                return str(done["stdout"])

            for name in ("small", "first", *(f"s{number}" for number in range(SESSIONS))):
                made = client.post("/api/sessions", json={"language": "python", "session_id": name, "isolation": kind})
                assert made.status_code == 201, made.text
            run("small", "open('kept', 'w').write('x')")
            run("first", MANY)  # what the first one of its kind takes besides
            client.delete("/api/sessions/first")
            before = server.resident_bytes
            for number in range(SESSIONS):
                run(f"s{number}", MANY)
            taken = server.resident_bytes - before
            assert (taken < 5 * FILES * 600) == (weakness == FEW), taken
            for number in range(SESSIONS):
                run(f"s{number}", CHANGE)
                found = client.get(f"/api/sessions/s{number}/files/d7/some-module-703.js")
                assert found.text == "xchanged"
                assert client.get(f"/api/sessions/s{number}/files/d8/some-module-803.js").status_code == 404
                assert run(f"s{number}", "import os; print(len(os.listdir('d8')))") == "99\n"
    finally:
        server.stop()
