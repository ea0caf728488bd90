"""Fixtures for tests of packages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packages.lab import Lab
from tests.packages.registry import Registry, serving


@pytest.fixture
def registry() -> Iterator[Registry]:
    with serving() as registry:
        yield registry


@pytest.fixture
def lab(tmp_path: Path, registry: Registry) -> Lab:
    return Lab(tmp_path, registry)
