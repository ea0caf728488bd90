"""`era serve` with days compressed into minutes: what the service does once an hour it does every few seconds."""

from __future__ import annotations

from functools import partial

from era import app
from era.client import cli
from era.core import garbage
from era.core.files.snapshots import Snapshots

PERIOD_SECONDS = 15.0
GRACE_SECONDS = 60.0
"""How young content is that may be about to be named by a row. A commit takes far less even on a busy machine."""

if __name__ == "__main__":
    garbage._PERIOD_SECONDS = PERIOD_SECONDS
    app.__dict__["Snapshots"] = partial(Snapshots, grace_seconds=GRACE_SECONDS)
    cli.main()
