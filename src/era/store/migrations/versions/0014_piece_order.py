"""The order in which the pieces of a run's output came."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("runs", sa.Column("pieces", sa.BigInteger))
    for table in ("outputs", "idempotency_keys"):
        op.add_column(table, sa.Column("piece_order", sa.LargeBinary))
        op.add_column(table, sa.Column("piece_order_digest", sa.String(64)))
