"""A whole service whose rows are in PostgreSQL, which goes away and comes back, and itself killed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.conftest import MakeServer, Server, eventually
from tests.postgres import Postgres
from tests.store.postgres_proxy import postgres_proxy

__all__ = ["postgres_proxy"]

COUNT = """
import json, pathlib, time
data = json.load(open('.session_data.json')); data['n'] = data.get('n', 0) + 1
json.dump(data, open('.session_data.json', 'w'))
pathlib.Path('n.txt').write_text(str(data['n']))
time.sleep(2)
"""


def answered(server: Server, path: str) -> httpx.Response | None:
    with server.client() as client:
        answer = client.get(path)
    return answer if answer.status_code == 200 else None


@pytest.mark.slow
def test_it_answers_503_while_its_database_is_away_and_goes_on_by_itself(
    own_server: MakeServer, postgres: Postgres, postgres_url: str
) -> None:
    server = own_server(database_url=postgres_url)
    assert not (server.data_dir / "era.sqlite").exists()

    def count() -> dict[str, Any]:
        with server.client() as client:
            answer = client.post("/api/sessions/a/run", json={"code": COUNT})
        assert answer.status_code == 200, answer.text
        outcome: dict[str, Any] = answer.json()
        return outcome

    with ThreadPoolExecutor(1) as others, server.client() as client:
        assert client.post("/api/sessions", json={"language": "python", "session_id": "a"}).status_code == 201
        running = others.submit(count)
        assert eventually(lambda: client.get("/api/sessions/a/runs").json()["runs"])
        postgres.stop()
        try:
            for path in ("/api/sessions/a", "/api/sessions", "/ready"):
                answer = client.get(path)
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "2"), answer.text
            made = client.post("/api/sessions", json={"language": "python", "session_id": "b"})
            assert (made.status_code, made.json()["error"]) == (503, "the database can't be reached")
        finally:
            postgres.start()
        outcome = running.result()
        assert (outcome["status"], outcome["state"]["committed"]) == ("ok", True)
        assert eventually(lambda: answered(server, "/api/sessions/a"))
        session = client.get("/api/sessions/a").json()
        assert (session["version"], session["data"]["n"]) == (2, 1)
        assert eventually(lambda: answered(server, "/ready"))
        assert count()["status"] == "ok"

    server.stop(9)
    server.start()
    with server.client() as client:
        session = client.get("/api/sessions/a").json()
        assert (session["version"], session["data"]["n"]) == (3, 2)
        assert client.get("/api/sessions/a/files/n.txt").text == "2"
        assert [each["status"] for each in client.get("/api/sessions/a/runs").json()["runs"]] == ["ok", "ok"]
    assert "Traceback" not in server.log
    assert "postgresql://postgres" not in server.log
