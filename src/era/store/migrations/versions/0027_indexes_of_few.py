"""Indexes of what is looked for all the time and is few of many: deliveries that wait or run, sessions at home at a
host, and those that may still expire."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None

_PARTIAL = (
    ("ix_deliveries_pending", "deliveries", ["session_key"], "status = 'pending'"),
    ("ix_deliveries_running", "deliveries", ["session_key"], "status = 'running'"),
    ("ix_sessions_expires_at", "sessions", ["expires_at"], "expires_at IS NOT NULL AND deleted_at IS NULL"),
)


def upgrade() -> None:
    op.drop_index("ix_sessions_expires_at", "sessions")
    for name, table, columns, which in _PARTIAL:
        op.create_index(name, table, columns, sqlite_where=sa.text(which), postgresql_where=sa.text(which))
    op.create_index("ix_homes_host_id", "homes", ["host_id"])
