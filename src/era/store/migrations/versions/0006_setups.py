"""What a session has installed: what it asks for, how far that is, how it went, and what came of it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_UNDER_WAY = sa.text("setup_status IN ('pending', 'running')")
_HAS_ENVIRONMENT = sa.text("environment IS NOT NULL")


def upgrade() -> None:
    op.add_column("sessions", sa.Column("setup", sa.Text))
    op.add_column("sessions", sa.Column("setup_status", sa.String(16)))
    op.add_column("sessions", sa.Column("setup_result", sa.Text))
    op.add_column("sessions", sa.Column("environment", sa.String(64)))
    op.create_index(
        "ix_sessions_setup_status",
        "sessions",
        ["setup_status"],
        sqlite_where=_UNDER_WAY,
        postgresql_where=_UNDER_WAY,
    )
    op.create_index(
        "ix_sessions_environment",
        "sessions",
        ["environment"],
        sqlite_where=_HAS_ENVIRONMENT,
        postgresql_where=_HAS_ENVIRONMENT,
    )
