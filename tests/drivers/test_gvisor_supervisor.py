"""Attacks of programs in gVisor on the supervisor of their sandbox, and on what later runs and the host's disk get from
it; some also on a build without the matching wall, where they must get through."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import pytest

from era.drivers import bubblewrap, watchdog
from tests.drivers.conformance.test_sandboxes import SETS_ID, with_set_id
from tests.drivers.process_steps import process, spec
from tests.drivers.sandboxes import Sandboxes, Weakness
from tests.drivers.test_gvisor_attacks import UNFILTERED_INSIDE, pytestmark, sandboxes, weak_sandboxes

__all__ = ["pytestmark", "sandboxes", "weak_sandboxes"]


@pytest.mark.parametrize("weak_sandboxes", [UNFILTERED_INSIDE], indirect=True)
def test_set_id_does_not_reach_the_disk_without_the_inner_filter(weak_sandboxes: Sandboxes) -> None:
    """The outer one refuses it to gVisor's gofer."""
    sandbox = weak_sandboxes.make()
    weak_sandboxes.run(sandbox, SETS_ID)
    assert with_set_id(sandbox.workspace) == []


@pytest.mark.parametrize("weak_sandboxes", [replace(UNFILTERED_INSIDE, unfiltered=True)], indirect=True)
def test_set_id_would_reach_the_disk_without_both_filters(weak_sandboxes: Sandboxes) -> None:
    """tests/drivers/conformance has the attack on sound sandboxes."""
    sandbox = weak_sandboxes.make()
    weak_sandboxes.run(sandbox, SETS_ID)
    assert {"chmod", "fchmod", "fchmodat"} <= set(with_set_id(sandbox.workspace))


FILLS_THE_LOG = """
import os
log = os.open("/proc/1/fd/2", os.O_RDWR)
try:
    for _ in range(20): os.write(log, bytes(1 << 20))
except OSError as problem: print(problem.strerror)
"""


def _log_bytes(sandboxes: Sandboxes) -> int:
    sandbox = sandboxes.make()
    sandboxes.run(sandbox, FILLS_THE_LOG)
    size = os.fstat(sandbox._log).st_size
    sandboxes.close(sandbox)
    return size


def test_the_log_of_a_supervisor_does_not_grow(sandboxes: Sandboxes) -> None:
    assert _log_bytes(sandboxes) == 8 << 10


def test_a_log_without_a_bound_would_grow(sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap, "bounded_log", lambda: os.memfd_create("log"))
    assert _log_bytes(sandboxes) >= 20 << 20


STOPS = "import os, signal, time\nos.kill(1, signal.SIGSTOP)\ntime.sleep(100)"


def test_a_supervisor_that_is_stopped_ends_with_its_run(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    begun = time.monotonic()
    ended = sandboxes.run(sandbox, STOPS, timeout=90).ended
    assert time.monotonic() - begun < 60
    assert (ended.cause, ended.sandbox_alive, ended.state) == ("killed", False, None)
    sandboxes.close(sandbox)
    assert sandboxes.run(sandboxes.make(), "print('well')").stdout == "well\n"


@pytest.mark.parametrize(
    "weak_sandboxes", [Weakness(supervisor={"os.WNOHANG | os.WUNTRACED": "os.WNOHANG"})], indirect=True
)
def test_a_supervisor_would_be_stopped_beyond_the_deadline(
    weak_sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "END_SECONDS", 2.0)
    assert weak_sandboxes.run(weak_sandboxes.make(), STOPS, timeout=1).ended.duration > 3


async def stop_supervisor(sandbox: Any) -> str:
    """A process stops the supervisor of processes. Returns how that process has ended."""
    return str((await process(sandbox, spec("python3", "-c", STOPS)))[1].cause)


def test_processes_whose_supervisor_is_stopped_end(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    assert sandboxes.do(sandbox, stop_supervisor) == "sandbox_died"
    assert sandboxes.run(sandbox, "print('well')").stdout == "well\n"
    sandboxes.close(sandbox)
