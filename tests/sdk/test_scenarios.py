"""One list of scenarios, and each client of the API: the results must be the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from era import AsyncEra, Era, EraError
from tests.conftest import Server
from tests.sdk import by_command, by_python, scenarios
from tests.sdk.scenarios import Names, Refused, compare
from tests.soaking import soak_the_rest


async def play(era: Era | AsyncEra, scenario: dict[str, Any]) -> None:
    names = Names()
    for written in scenario["steps"]:
        step = names.filled(written)
        value, error = None, None
        try:
            value = await by_python.take(era, step["call"], step.get("on"), dict(step.get("args", {})))
        except EraError as problem:
            error = problem.code
        compare(step, value, error)
        names.save(step, value)


@pytest.mark.parametrize(
    "scenario", soak_the_rest(scenarios.LIST, scenarios.LIST[::4]), ids=lambda scenario: scenario["name"]
)
async def test_the_blocking_client(scenario: dict[str, Any], server: Server) -> None:
    """It is made of the one for asyncio, which plays all of them (test_made.py)."""
    with Era(server.url) as era:
        await play(era, scenario)


@pytest.mark.parametrize("scenario", scenarios.LIST, ids=lambda scenario: scenario["name"])
async def test_the_client_for_asyncio(scenario: dict[str, Any], server: Server) -> None:
    async with AsyncEra(server.url) as era:
        await play(era, scenario)


@pytest.mark.parametrize(
    "scenario", soak_the_rest(scenarios.LIST, scenarios.LIST[::3]), ids=lambda scenario: scenario["name"]
)
def test_the_command(scenario: dict[str, Any], server: Server, tmp_path: Path) -> None:
    """It is the client for asyncio that does its work; tests/client has tests of each command."""
    names, command = Names(), by_command.Command(server, tmp_path)
    for written in scenario["steps"]:
        step = names.filled(written)
        value, error = None, None
        try:
            value = command.take(step["call"], step.get("on"), dict(step.get("args", {})))
        except Refused as problem:
            error = problem.code
        compare(step, value, error)
        names.save(step, value)


def test_every_step_is_known() -> None:
    calls = {step["call"] for scenario in scenarios.LIST for step in scenario["steps"]}
    assert calls == by_python.STEPS.keys()
    assert calls == by_command.STEPS.keys()
