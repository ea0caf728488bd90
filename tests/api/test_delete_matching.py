"""DELETE /api/sessions with the filters of the list: what is deleted is what the list shows, and nothing else."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.api.answers import refused
from tests.api.guest_servers import start_in_background
from tests.conftest import MakeSession, eventually
from tests.table import table


@pytest.fixture
def four(session: MakeSession) -> None:
    session(session_id="py-blue", metadata={"team": "blue", "n": 1})
    session(session_id="py-red", metadata={"team": "red"})
    session("node", session_id="js-blue", metadata={"team": "blue"})
    session(session_id="plain")


def ids(client: httpx.Client, **query: Any) -> list[str]:
    return [each["id"] for each in client.get("/api/sessions", params=query).json()["sessions"]]


@pytest.mark.parametrize(
    ("query", "gone"),
    [
        ({"metadata.team": "blue"}, {"py-blue", "js-blue"}),
        ({"metadata.team": "blue", "metadata.n": "1"}, {"py-blue"}),
        ({"language": "js"}, {"js-blue"}),
        ({"language": "python", "metadata.team": "blue"}, {"py-blue"}),
        ({"metadata.team": "green"}, set()),
        ({"status": "running"}, set()),
        ({"status": "idle", "metadata.team": "red", "_": "1"}, {"py-red"}),
    ],
)
@pytest.mark.usefixtures("four")
def test_what_the_list_shows_is_deleted(client: httpx.Client, query: dict[str, str], gone: set[str]) -> None:
    assert set(ids(client, **query)) == gone
    answer = client.delete("/api/sessions", params=query).json()
    assert set(answer["deleted_sessions"]) == gone
    assert answer["deleted_count"] == len(gone)
    assert set(ids(client)) == {"py-blue", "py-red", "js-blue", "plain"} - gone
    assert set(ids(client, status="deleted")) >= gone


@table(
    "query",
    [
        "language=",
        "metadata.team=",
        "status=",
        "limit=1",
        "cursor=x",
        "metadata.team=blue&metadata.team=red",
        "&".join(f"metadata.k{n}=v" for n in range(33)),
        "language=cobol",
        "status=done",
        "metadata=blue",
        "team=blue",
        "status=deleted",
    ],
)
@pytest.mark.usefixtures("four")
def test_a_query_that_does_not_say_which_deletes_nothing(client: httpx.Client, query: str) -> None:
    refused(client.delete(f"/api/sessions?{query}"), 400)
    assert len(ids(client)) == 4


@pytest.mark.usefixtures("four")
def test_a_running_session_is_deleted_with_its_run(client: httpx.Client) -> None:
    start_in_background(client, "plain", "import time; time.sleep(600)")
    assert eventually(lambda: ids(client, status="running") == ["plain"])
    assert client.delete("/api/sessions?status=running").json()["deleted_sessions"] == ["plain"]
    assert len(ids(client)) == 3


def test_purging_the_deleted_leaves_who_has_their_ids_now(client: httpx.Client, session: MakeSession) -> None:
    session(session_id="s", metadata={"old": "yes"})
    client.delete("/api/sessions/s")
    session(session_id="s")
    answer = client.delete("/api/sessions?status=deleted&metadata.old=yes&purge=true").json()
    assert answer["deleted_sessions"] == ["s"]
    assert ids(client) == ["s"]
    assert client.delete("/api/sessions/s").status_code == 200
    assert "yes" not in client.post("/api/sessions/s/restore").text
