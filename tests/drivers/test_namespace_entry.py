"""Entering a sandbox's namespaces: those of its own PID 1, and of no process that has got its number."""

from __future__ import annotations

import os
import subprocess
from typing import Any, cast

import pytest

from era.core.models import JsonObject
from era.drivers.forking import Forked, Forker, TemplateFailed
from era.drivers.namespace_entry import _enter


class Asked:
    """A forker that only notes that it was asked."""

    def __init__(self) -> None:
        self.forks = 0

    def fork(self, _request: JsonObject, descriptors: list[int]) -> Forked:
        self.forks += 1
        return Forked(1, descriptors[0])


def test_what_has_the_number_of_a_sandbox_that_ended_is_not_entered() -> None:
    forker, given = Asked(), dict[str, Any](uid=None, control=0, log=2, groups=[])
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        pidfd = os.pidfd_open(process.pid)
        _enter(cast("Forker", forker), os.getpid(), pidfd, {}, **given)
        assert forker.forks == 1
    with pytest.raises(TemplateFailed, match="it has ended"):
        _enter(cast("Forker", forker), os.getpid(), pidfd, {}, **given)
    os.close(pidfd)
    assert forker.forks == 1
