"""Contexts by the SDK and the command."""

from __future__ import annotations

from era import AsyncEra, Era
from tests.client.command import era
from tests.conftest import Server


def test_cells_share_variables(server: Server) -> None:
    with Era(server.url) as client:
        session = client.session("python", data={"n": 1})
        context = session.context()
        assert context.run("x = 40", env={"A": "1"}).ok
        cell = context.run("print('x is', x)\nx + 2")
        assert (cell.stdout, cell.value) == ("x is 40\n", {"text/plain": "42"})
        assert cell.execution_count == 2
        failed = context.run("1/0")
        assert failed.error is not None
        assert failed.error["name"] == "ZeroDivisionError"
        assert [each.name for each in session.contexts()] == ["main"]
        with context.stream("print(x)\nx") as stream:
            assert stream.wait().value == {"text/plain": "40"}
        assert context.interrupt() is False
        assert context.restart().name == "main"
        error = context.run("x").error
        assert error is not None
        assert error["name"] == "NameError"
        context.delete()
        assert session.contexts() == []
        assert session.run("print(1)").value is None


async def test_cells_for_asyncio(server: Server) -> None:
    async with AsyncEra(server.url) as client:
        context = (await client.session("node")).context("side")
        await context.run("let x = 41")
        assert (await context.run("x + 1")).value is not None
        await context.delete()


def test_cells_by_the_command(server: Server) -> None:
    era(server, "run", "-l", "py", "-s", "book", "--context", "main", "-", stdin="x = 41", code=0)
    assert (
        era(server, "run", "-s", "book", "--context", "main", "-", stdin="print(1)\nx + 1", code=0).stdout == "1\n42\n"
    )
    assert "--session" in era(server, "run", "-l", "py", "--context", "main", "-", stdin="1", code=2).stderr
    (row,) = era(server, "contexts", "list", "book", code=0).stdout.splitlines()
    assert row.split()[:3] == ["main", "idle", "2"]
    assert "no cell" in era(server, "contexts", "interrupt", "book", "main", code=0).stderr
    assert "--process" in era(server, "exec", "book", "-i", "--", "cat", code=2).stderr
