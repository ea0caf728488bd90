"""Pictures, documents and tables that a run left."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("runs", sa.Column("artifacts", sa.Text, nullable=False, server_default="{}"))
