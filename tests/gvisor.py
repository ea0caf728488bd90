"""Whether this machine has gVisor, and the marker of tests that need it."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

HAS_GVISOR = shutil.which("runsc", path="/usr/bin") is not None
needs_gvisor = pytest.mark.skipif(
    not HAS_GVISOR, reason="gVisor's runsc is not installed (as root: scripts/setup --test)"
)

BOTH_KINDS = ["bubblewrap", pytest.param("gvisor", marks=[needs_gvisor, pytest.mark.soak])]
"""Of sandboxes, for what is bounded or done outside of them: it's the same code for both, so one does every day."""


def of_kind(isolation: str) -> dict[str, Any]:
    """The fields of a session with sandboxes of this kind. In gVisor it has limits of its own: with the usual ones a
    sandbox would be kept ready from then on, which the tests of a shared server would take for a leak."""
    return {"isolation": isolation} | ({"limits": {"pids": 100}} if isolation == "gvisor" else {})
