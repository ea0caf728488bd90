"""Which cases of a test `make test` tries, where the others differ in a number only, or in what another test tries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], of: int | Iterable[Any]) -> list[Any]:
    """Parameters of a test: so many cases from the first on, or these, and in soak tests all."""
    every = list(cases)
    kept = every[:of] if isinstance(of, int) else list(of)
    assert all(case in every for case in kept), "a case that there isn't"
    return [case if case in kept else pytest.param(case, marks=pytest.mark.soak) for case in every]
