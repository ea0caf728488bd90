"""Runs that were on another server are marked, so that this one's numbers leave them out."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("runs", sa.Column("imported", sa.Boolean, nullable=False, server_default=sa.false()))
    op.drop_index("ix_runs_status", "runs")
    op.create_index("ix_runs_status", "runs", ["status", "imported"])
