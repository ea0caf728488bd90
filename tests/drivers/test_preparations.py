"""Preparing languages: once for a machine, in the background, with sandboxes that wait for it."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from era import languages
from era.core.pool.ready_sandboxes import ReadySandboxes
from era.core.program import Output, Program
from era.drivers import preparations as module
from era.drivers.bubblewrap import BubblewrapDriver
from era.drivers.preparations import Preparations
from era.errors import Unavailable
from era.languages import preparation as preparing
from era.languages.preparation import READY, Preparation, PreparationFailed
from tests.conftest import eventually
from tests.drivers.sandboxes import LIMITS

BUILD = "echo $$ >>../attempts; while [ ! -e ../go ]; do sleep 0.02; done; echo made >result"
"""Counts its attempts, waits for a file `go` in the place, and makes the result."""


def preparation(script: str = BUILD, mount: str = "/opt/slow") -> Preparation:
    def command(directory: Path) -> tuple[Sequence[str], Mapping[str, str]]:
        return ("/bin/sh", "-c", f"cd {directory}; {script}"), {"PATH": "/usr/bin:/bin"}

    return Preparation("slow-1", "The slow library", mount, command)


@pytest.fixture(autouse=True)
def directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The installation and the user's cache."""
    found = [tmp_path / "installation", tmp_path / "cache"]
    monkeypatch.setattr(preparing, "_directories", lambda: tuple(found))
    monkeypatch.setattr(preparing, "_POLL_SECONDS", 0.02)
    return found


def attempts(place: Path) -> list[int]:
    """The pids of the builds that were begun in a place."""
    file = place / "attempts"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


async def begun(place: Path, count: int = 1) -> int:
    """Wait for a build to begin; its pid."""
    async with asyncio.timeout(120):
        while len(attempts(place)) < count:  # noqa: ASYNC110  nothing tells of it
            await asyncio.sleep(0.01)
    return attempts(place)[-1]


async def test_a_language_waits_until_it_is_prepared_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WAIT_SECONDS", 0.1)
    prepared = Preparations({"slow": preparation()}, tmp_path / "fallback")
    place = prepared.mounts["/opt/slow"]
    assert place == tmp_path / "installation/slow-1"
    prepared.start()
    try:
        pid = await begun(place)
        assert os.sched_getscheduler(pid) == os.SCHED_IDLE
        with pytest.raises(Unavailable, match="The slow library is still being compiled"):
            await prepared.wait("slow")
        await prepared.wait("python")
        (place / "go").touch()
        monkeypatch.setattr(module, "_WAIT_SECONDS", 120.0)
        await prepared.wait("slow")
        assert (place / READY / "result").read_text() == "made\n"
        assert (place / READY / "result").stat().st_mode & 0o777 == 0o644
    finally:
        await prepared.stop()
    again = Preparations({"slow": preparation()}, tmp_path / "fallback")
    again.start()
    await again.wait("slow")
    assert len(attempts(place)) == 1, "it is done once"


async def test_preparation_begins_when_its_language_is_asked_for(tmp_path: Path) -> None:
    on_demand = replace(preparation(), at_start=False)
    prepared = Preparations({"slow": on_demand}, tmp_path / "fallback")
    place = prepared.mounts["/opt/slow"]
    (place / "go").touch()
    await prepared.wait("slow")  # as the self-test of the drivers does, before the service has started
    prepared.start()
    await prepared.wait("python")
    assert prepared._tasks == {}
    await asyncio.gather(prepared.wait("slow"), prepared.wait("slow"))
    assert len(attempts(place)) == 1
    assert (place / READY).is_dir()
    await prepared.stop()


async def test_spare_sandboxes_ask_for_no_long_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would have Go compiled at the first start of each machine. Once a session has asked, spares are kept."""
    monkeypatch.setattr(preparing, "_directories", lambda: ())  # nothing has been prepared
    made: list[str] = []

    async def make(_: str, language: str) -> Any:
        made.append(language)
        raise Unavailable("not here")

    async def close(*_: Any) -> None: ...

    ready = ReadySandboxes(1, make, close)
    ready.start()
    try:
        others = set(languages.runtimes()) - {"go"}
        assert await asyncio.to_thread(eventually, lambda: set(made) == others)
        await ready.take("auto", "go")
        assert await asyncio.to_thread(eventually, lambda: "go" in made)
    finally:
        await ready.stop()


async def test_of_two_services_one_builds(tmp_path: Path) -> None:
    both = [Preparations({"slow": preparation()}, tmp_path / "fallback") for _ in range(2)]
    place = both[0].mounts["/opt/slow"]
    for prepared in both:
        prepared.start()
    await begun(place)
    await asyncio.sleep(0.1)
    (place / "go").touch()
    await asyncio.gather(*(prepared.wait("slow") for prepared in both))
    assert len(attempts(place)) == 1
    assert (place / READY).is_dir()


async def test_what_was_cut_off_is_built_upon(tmp_path: Path) -> None:
    first = Preparations({"slow": preparation("echo part >>part; " + BUILD)}, tmp_path / "fallback")
    place = first.mounts["/opt/slow"]
    (place / "building-of-an-earlier-boot").mkdir()
    first.start()
    pid = await begun(place)
    waiting = asyncio.create_task(first.wait("slow"))
    await asyncio.sleep(0)
    await first.stop()
    with pytest.raises(Unavailable, match="about to stop"):
        await waiting
    assert eventually(lambda: not Path(f"/proc/{pid}").exists()), "nothing of it goes on"
    assert not (place / READY).exists()

    (place / "go").touch()
    second = Preparations({"slow": preparation("echo part >>part; " + BUILD)}, tmp_path / "fallback")
    second.start()
    await second.wait("slow")
    assert (place / READY / "part").read_text() == "part\npart\n"
    assert sorted(path.name for path in place.iterdir()) == ["attempts", "go", "lock", READY]


async def test_it_ends_with_a_service_that_is_killed(tmp_path: Path) -> None:
    place = preparation().make_place()
    code = (
        "import asyncio, sys\nfrom pathlib import Path\n"
        "from era.languages import preparation\n"
        f"command = lambda directory: (('/bin/sh', '-c', {f'cd {place}/b*; {BUILD}'!r}), {{'PATH': '/usr/bin:/bin'}})\n"
        f"made = preparation.Preparation('slow-1', 'It', '/opt/slow', command)\n"
        f"asyncio.run(made.run(Path({str(place)!r})))"
    )
    service = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    pid = await begun(place)
    service.send_signal(signal.SIGKILL)
    await service.wait()
    assert eventually(lambda: not Path(f"/proc/{pid}").exists())


async def test_without_it_programs_are_slow_and_no_worse(tmp_path: Path) -> None:
    """A failed preparation is tried again at the next start."""
    broken = preparation("echo 'no room' >&2; exit 3")
    prepared = Preparations({"slow": broken}, tmp_path / "fallback")
    prepared.start()
    await prepared.wait("slow")
    assert broken.ready_place() is None
    with pytest.raises(PreparationFailed, match="no room"):
        await broken.run(broken.make_place())
    (broken.make_place() / "go").touch()
    await preparation().run(broken.make_place())
    assert broken.ready_place() == tmp_path / "installation/slow-1"


async def test_a_sandbox_sees_what_is_prepared_later(tmp_path: Path) -> None:
    """And one of the language itself is made when that is done."""
    prepared = Preparations({"node": preparation(mount=(mount := "/opt/go-std"))}, tmp_path / "fallback")
    directory, name = tmp_path / "data", f"era-test-{secrets.token_hex(4)}"
    directory.mkdir()
    driver = BubblewrapDriver(directory, LIMITS, cgroup_name=name, preparations=prepared)
    driver.self_tested = ()
    await driver.clear()
    await driver.start()
    prepared.start()
    try:
        early = await driver.create("python", LIMITS)
        late = asyncio.create_task(driver.create("node", LIMITS))
        await begun(prepared.mounts[mount])
        await asyncio.sleep(0.2)
        assert not late.done()
        (prepared.mounts[mount] / "go").touch()
        await prepared.wait("node")
        code = f"print(open('{mount}/{READY}/result').read())".encode()
        events = [event async for event in early.run(Program(code, b"{}", {}, 20, ephemeral=True, files={}))]
        assert b"".join(event.data for event in events if isinstance(event, Output)) == b"made\n\n"
        assert (await late).alive
    finally:
        await prepared.stop()
        await driver.stop()


def test_where_it_is_kept(tmp_path: Path, directories: list[Path]) -> None:
    """In the first directory that can be written; a result is found in any of them."""
    directories[0] = Path("/proc/era")  # nobody can write there
    assert preparation().make_place() == tmp_path / "cache/slow-1"
    directories[1] = Path("/proc/era")
    assert Preparations({"slow": preparation()}, tmp_path / "data").mounts == {"/opt/slow": tmp_path / "data/slow-1"}
    with pytest.raises(OSError, match="no directory"):
        preparation().make_place()
    directories[1] = tmp_path / "cache"
    (tmp_path / "cache/slow-1" / READY).mkdir()
    assert Preparations({"slow": preparation()}, tmp_path / "data").mounts == {"/opt/slow": tmp_path / "cache/slow-1"}


def test_what_this_machine_prepares() -> None:
    assert {name: one.mount for name, one in languages.preparations().items()} == {
        "go": "/opt/go-std",
        "contexts": "/opt/ipython",
    }
