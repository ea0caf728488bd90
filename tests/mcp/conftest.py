"""Fixtures of other tests that these use too."""

from __future__ import annotations

from tests.api.conftest import owners as owners
