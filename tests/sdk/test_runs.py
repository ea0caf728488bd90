"""The records of runs of all sessions by the SDK."""

from __future__ import annotations

from era import AsyncEra, Era
from tests.conftest import Server


def test_runs_of_all_sessions_by_what_is_asked_for(server: Server) -> None:
    with Era(server.url) as client, client.session("python") as session:
        ran = [session.run("pass"), session.run("raise SystemExit(3)"), session.run("raise SystemExit(4)")]
        failed = client.runs(session=session.id, status="failed")
        assert [record.exit_code for record in failed] == [4, 3]
        assert [record.run_id for record in client.runs(1, session=session.id)] == [ran[2].run_id]
        since = session.runs.list()[1].started_at
        assert [record.run_id for record in client.runs(session=session.id, since=since)] == [
            ran[2].run_id,
            ran[1].run_id,
        ]


async def test_runs_of_all_sessions_for_asyncio(server: Server) -> None:
    async with AsyncEra(server.url) as client, client.session("python") as session:
        ran = await session.run("pass")
        assert ran.run_id in [record.run_id for record in await client.runs(status="ok", session=session.id)]
