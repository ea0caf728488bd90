"""What a session asks for: limits, and which isolation."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("sessions", sa.Column("limits", sa.Text, nullable=False, server_default="{}"))
    op.add_column("sessions", sa.Column("isolation", sa.String(16), nullable=False, server_default="auto"))
