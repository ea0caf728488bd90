"""Whether this machine has gVisor, and the marker of tests that need it."""

from __future__ import annotations

import shutil

import pytest

HAS_GVISOR = shutil.which("runsc", path="/usr/bin") is not None
needs_gvisor = pytest.mark.skipif(
    not HAS_GVISOR, reason="gVisor's runsc is not installed (as root: scripts/setup --test)"
)
