"""Setups whose end can't be recorded, or is recorded while somebody looks for setups to do."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from era.core.metadata import SetupJob
from era.core.setup.commands import Commands, CommandsResult
from era.core.setup.package_sets import PackageSet, SetupFailed
from era.core.setup.progress import Progress, Say
from era.core.setup.requirements import Packages
from era.core.setup.setups import Setups
from era.core.telemetry import Event, Note, SetupEnded, ignore
from era.errors import Unavailable
from tests.owners import mine
from tests.unit.core import Core, until


def setups_of(core: Core, note: Note = ignore) -> tuple[Setups, Commands]:
    none: Any = None
    bound: Any = core.runs._parts.history
    commands = Commands(core.pool, core.network, core.snapshots, bound)
    return Setups(core.store, none, none, core.turns, none, commands, core.liveness, 10.0, note), commands


async def test_what_commands_left_is_not_kept_where_that_could_not_be_recorded(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setup is taken up again, with the files of the version in force."""
    setups, _ = setups_of(core)
    end_setup, failures = core.store.end_setup, [Unavailable("the disk is full")]

    async def failing(*args: Any, **fields: Any) -> bool:
        if failures:
            raise failures.pop()
        return await end_setup(*args, **fields)

    monkeypatch.setattr(core.store, "end_setup", failing)
    await core.session("s", setup='{"commands": ["echo tried >> log"]}')
    await setups.start()
    try:
        assert await setups.settled(mine("s"), 10)
        assert not failures
        core.setup_may_end.set()
        assert (await core.run("print(open('log').read())")).stdout == b"tried\n\n"
    finally:
        await setups.stop()


async def test_a_setup_that_ends_while_it_is_listed_is_not_done_again(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second time its commands would share the sandbox with a run, which would end with it."""
    setups, commands = setups_of(core)
    end_setup, run, unfinished_setups = core.store.end_setup, commands.run, core.store.unfinished_setups
    read, ended = asyncio.Event(), asyncio.Event()
    lists = runs = 0

    async def late() -> Sequence[SetupJob]:
        nonlocal lists
        jobs = await unfinished_setups()
        lists += 1
        if lists == 2:
            assert jobs, "the setup had ended before"
            read.set()
            await ended.wait()
        return jobs

    async def counted(*args: Any) -> CommandsResult:
        nonlocal runs
        runs += 1
        return await run(*args)

    async def end(*args: Any, **fields: Any) -> bool:
        setups.kick()
        await read.wait()
        return await end_setup(*args, **fields)

    monkeypatch.setattr(core.store, "unfinished_setups", late)
    monkeypatch.setattr(core.store, "end_setup", end)
    monkeypatch.setattr(commands, "run", counted)
    await core.session("s", setup='{"commands": ["echo done"]}')
    await setups.start()
    try:
        assert await setups.settled(mine("s"), 10)
        assert not setups._jobs, "the job was still about to hand on the sandbox"
        ended.set()
        await until(lambda: lists >= 3 and not setups._jobs)
        assert runs == 1
    finally:
        await setups.stop()


async def test_package_sets_stay_as_long_as_a_setup_may_name_them(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its commands take longer than a package set stays that nobody needs."""
    swept: list[float] = []

    class Sweeping:
        def sweep(self, _keep: set[str], older_than: float, free_before: float) -> int:
            swept.extend((older_than, free_before))
            return 0

    setups, _ = setups_of(core)
    monkeypatch.setattr(setups, "_installer", Sweeping())
    begun = time.time() - 7200
    under_way: Any = SimpleNamespace(begun_at=begun)
    monkeypatch.setitem(setups._jobs, SetupJob(1, mine("s"), "{}"), under_way)
    await setups.sweep()
    assert max(swept) < begun


async def test_what_commands_leave_beyond_a_quota_is_not_kept(core: Core) -> None:
    """The setup fails, says which quota it was, and the session is as it was."""
    told: list[Event] = []
    reached: list[str] = []
    setups, _ = setups_of(core, told.append)
    await core.quotas.set("default", {"disk_mb": 1})
    core.quotas.on_reached.append(lambda _, error: reached.append(error.code))
    made = await core.session("s", setup=json.dumps({"commands": ["head -c 2000000 /dev/zero > large"]}))
    await setups.start()
    try:
        assert await setups.settled(mine("s"), 10)
        session = await core.store.session(mine("s"))
        assert (session.setup_status, session.version, session.snapshot) == ("failed", made.version, made.snapshot)
        result = json.loads(session.setup_result or "")
        assert not result["success"]
        assert "This owner may have 1 MiB of files, and 0 are taken." in result["error"]
        assert [event.outcome for event in told if isinstance(event, SetupEnded)] == ["failed"]
        assert reached == ["quota_reached"]
        core.setup_may_end.set()
        assert (await core.run("import os; print(os.path.exists('large'))")).stdout == b"False\n"
        await core.quotas.set("default", {"disk_mb": 2})
        await setups.again(mine("s"))
        assert await setups.settled(mine("s"), 10)
        session = await core.store.session(mine("s"))
        assert (session.setup_status, session.snapshot.total_bytes) == ("completed", 2_000_000)
    finally:
        await setups.stop()


async def test_a_setup_that_the_service_s_stop_cuts_off_is_left_for_the_next_start(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its tool has written something that is only read once it has been killed."""
    setups, _ = setups_of(core)
    installer, is_making = installing(setups, monkeypatch), asyncio.Event()

    async def make(*_: Any, say: Say, **named: Any) -> PackageSet:
        try:
            is_making.set()
            return await asyncio.Future()
        finally:
            say("stdout", b"Downloaded\n")

    monkeypatch.setattr(installer, "make", make)
    await core.session("s", setup='{"pip": ["one"]}')
    await setups.start()
    await is_making.wait()
    await setups.stop()
    assert (await core.store.session(mine("s"))).setup_status == "running"


class Installing:
    """An installer that installs nothing."""

    def __init__(self) -> None:
        self.made = 0

    async def find_installed(self, *_: Any) -> PackageSet | None:
        return PackageSet("0" * 64, [], []) if self.made else None

    async def make(self, *_: Any, **named: Any) -> PackageSet:
        self.made += 1
        return PackageSet("0" * 64, [], [])


def installing(setups: Setups, monkeypatch: pytest.MonkeyPatch) -> Installing:
    """Give setups such an installer."""
    installer = Installing()
    monkeypatch.setattr(setups, "_installer", installer)
    monkeypatch.setattr(setups, "_builds", lambda _: None)
    return installer


@pytest.mark.parametrize("no_such", [True, False])
async def test_the_versions_of_a_lock_stay_unless_the_registry_has_them_no_more(
    core: Core, monkeypatch: pytest.MonkeyPatch, no_such: bool
) -> None:
    """A registry that can't be reached for a moment would have other versions take their place for good."""
    setups, _ = setups_of(core)
    installer, asked = installing(setups, monkeypatch), list[tuple[str, ...]]()

    async def make(packages: Packages, *_: Any, **named: Any) -> PackageSet:
        asked.append(packages.pip)
        if packages.pip == ("one==1.0",):
            raise SetupFailed("it can't be had", no_such=no_such)
        return PackageSet("0" * 64, [{"name": "one", "version": "2.0"}], [])

    monkeypatch.setattr(installer, "make", make)
    session = await core.session("s", setup='{"pip": ["one"]}')
    lock = json.dumps({"pip": [{"name": "one", "version": "1.0"}], "npm": [], "go": []})
    job = SetupJob(session.key, session.owned_id, '{"pip": ["one"]}', lock)
    if no_such:
        made = await setups._install(job, Packages(pip=("one",)), False, Progress(0))
        assert "aren't all the very packages" in made.stderr
        assert asked == [("one==1.0",), ("one",)]
    else:
        with pytest.raises(SetupFailed, match="it can't be had"):
            await setups._install(job, Packages(pip=("one",)), False, Progress(0))
        assert asked == [("one==1.0",)]
