"""Where programs may connect to, and where they did."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("sessions", sa.Column("egress", sa.Text, nullable=False, server_default="{}"))
    op.add_column("runs", sa.Column("egress", sa.Text, nullable=False, server_default="{}"))
