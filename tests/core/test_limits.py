"""What a session is granted of what it asks for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from era.core.limits import Rules, bounds, can_be_limits, merged
from era.errors import BadRequest
from tests.core.lab import LIMITS

RULES = Rules(LIMITS, replace(LIMITS, memory_bytes=1 << 30, cpus=2.0, disk_bytes=8 << 30))


def test_what_is_not_asked_for_is_the_servers() -> None:
    assert RULES.granted({}) == LIMITS
    assert RULES.granted({"memory_mb": 100, "cpus": 0.5}) == replace(LIMITS, memory_bytes=100 << 20, cpus=0.5)


def test_more_memory_makes_the_scratch_directories_larger() -> None:
    assert RULES.granted({"memory_mb": 1024}).tmp_bytes == 2 * LIMITS.tmp_bytes
    assert RULES.granted({"memory_mb": 64}).tmp_bytes == LIMITS.tmp_bytes


def test_nothing_is_granted_over_the_maximum() -> None:
    with pytest.raises(BadRequest, match="1024"):
        RULES.check({"memory_mb": 1025})
    RULES.check({"memory_mb": 1024, "pids": None})
    assert RULES.granted({"memory_mb": 4096, "disk_mb": 1 << 40}) == RULES.granted({"memory_mb": 1024, "disk_mb": 8192})
    assert RULES.in_api_units({"memory_mb": 4096})["memory_mb"] == 1024


def test_the_bounds_of_a_tree_are_those_of_the_disk() -> None:
    tree = bounds(RULES.granted({"disk_mb": 7, "files": 99}))
    assert (tree.total_bytes, tree.entries) == (7 << 20, 99)


def test_wishes_are_added_and_taken_back() -> None:
    assert merged({"pids": 20, "files": 30}, {"pids": None, "cpus": 1.5}) == {"files": 30, "cpus": 1.5}


@pytest.mark.parametrize(
    ("wishes", "can_be"),
    [
        ({}, True),
        ({"memory_mb": 64, "cpus": 0.05}, True),
        ({"cpus": 2}, True),
        ({"memory_mb": 63}, False),
        ({"memory_mb": 64.0}, False),
        ({"pids": True}, False),
        ({"cpus": float("nan")}, False),
        ({"cpus": float("inf")}, False),
        ({"threads": 64}, False),
        ({"files": "64"}, False),
        ({"files": 1 << 60}, False),
        ([], False),
        (None, False),
    ],
)
def test_what_comes_from_a_capsule_is_checked(wishes: Any, can_be: bool) -> None:
    assert can_be_limits(wishes) is can_be
