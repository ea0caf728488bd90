"""`era serve` with days compressed into minutes: what the service does once an hour it does every few seconds."""

from __future__ import annotations

from functools import partial

from era import app, parts
from era.client import cli
from era.core.live.live_sessions import LiveSessions
from era.core.metadata import Retention
from era.core.operation import garbage
from era.core.owners.audit import Audit
from era.core.trees.snapshots import Snapshots
from era.server import bounds

PERIOD_SECONDS = 15.0
GRACE_SECONDS = 60.0
"""How young content is that may be about to be named by a row. A commit takes far less even on a busy machine."""

CHECKPOINT_SECONDS = 2.0
RUNS_KEPT, AUDIT_KEPT = 5, 500

if __name__ == "__main__":
    garbage._PERIOD_SECONDS = PERIOD_SECONDS
    parts.__dict__["Snapshots"] = partial(Snapshots, grace_seconds=GRACE_SECONDS)
    parts.__dict__["LiveSessions"] = partial(LiveSessions, checkpoint_seconds=CHECKPOINT_SECONDS)
    app.__dict__["Audit"] = partial(Audit, kept=AUDIT_KEPT)
    bounds.__dict__["Retention"] = partial(Retention, runs=RUNS_KEPT)
    cli.main()
