"""Sandboxes that were put away: dead, but for their directory and their uid, which one heir may have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from era.drivers.bubblewrap import BubblewrapSandbox
from tests.conftest import descendants
from tests.drivers.sandboxes import LIMITS, Sandboxes


def _heir(sandboxes: Sandboxes, old: BubblewrapSandbox) -> BubblewrapSandbox:
    made: BubblewrapSandbox = sandboxes._runner.run(sandboxes.driver.create("python", LIMITS, heir_to=old))
    return made


def test_only_its_directory_is_left(sandboxes: Sandboxes) -> None:
    before = descendants(os.getpid())
    sandbox = sandboxes.make()
    sandboxes.run(sandbox, "open('kept', 'w').write('1')")
    sandboxes._runner.run(sandbox.put_away())
    assert not sandbox.alive
    assert set(descendants(os.getpid())) <= set(before)
    assert sandbox.cpu_seconds() == sandbox.memory_bytes() == 0, "asking about what is gone is no error"
    assert not list(Path("/sys/fs/cgroup").glob(f"**/{sandboxes.cgroup_name}/{sandbox.id}"))
    assert (sandbox.workspace / "kept").read_text() == "1"
    sandboxes._runner.run(sandbox.close())
    assert not sandbox.workspace.parent.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user's sandboxes have no uid of their own")
def test_its_uid_goes_to_its_heir_and_to_nobody_else(sandboxes: Sandboxes) -> None:
    old = sandboxes.make()
    uid = old.uid
    with pytest.raises(ValueError, match="no process"):
        _heir(sandboxes, old)
    sandboxes._runner.run(old.put_away())
    assert sandboxes.make().uid != uid, "its files have it"
    heir = _heir(sandboxes, old)
    sandboxes._runner.run(old.close())
    assert heir.uid == uid
    assert sandboxes.run(heir, "import os; print(os.stat('.').st_uid == os.getuid())").stdout == "True\n"
    assert sandboxes.make().uid != uid
    sandboxes._runner.run(heir.close())
    assert sandboxes.make().uid == uid, "it is free again"
