"""Which cases of a test `make test` tries, where the others differ in a number only, or in what another test tries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def soak_the_rest(cases: Iterable[Any], kept_cases: int | Iterable[Any]) -> list[Any]:
    """A test's parameters. All get the mark `soak`, but for `kept_cases`: so many, or these."""
    every = list(cases)
    kept = every[:kept_cases] if isinstance(kept_cases, int) else list(kept_cases)
    assert all(case in every for case in kept), "a case that there isn't"
    return [case if case in kept else pytest.param(case, marks=pytest.mark.soak) for case in every]
