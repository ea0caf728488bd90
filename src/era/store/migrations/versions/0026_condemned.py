"""Content that a collection of garbage by a host of a cluster is to remove from a bucket, or has removed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "condemned",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("collection", sa.String(32)),
        sa.Column("gone_at", sa.BigInteger, nullable=False),
        sa.Column("kept_until", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_condemned"),
    )
