"""The code or command that a run ran, in its record, and whether a session's runs record it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0030"
down_revision = "0029"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("runs", sa.Column("invocation", sa.Text, nullable=False, server_default="{}"))
    op.add_column("runs", sa.Column("code", sa.Text))
    op.add_column("sessions", sa.Column("record_code", sa.Boolean, nullable=False, server_default=sa.true()))
