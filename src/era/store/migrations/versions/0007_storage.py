"""Storage that sessions share: values by key, each in its row or, where it is long, as a blob."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_HAS_DIGEST = sa.text("digest IS NOT NULL")


def upgrade() -> None:
    op.create_table(
        "storage_items",
        sa.Column("kind", sa.String(2), primary_key=True),
        sa.Column("namespace", sa.String(64), primary_key=True),
        sa.Column("key", sa.LargeBinary, primary_key=True),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("metadata", sa.Text),
        sa.Column("digest", sa.String(64)),
        sa.Column("value", sa.LargeBinary),
    )
    op.create_index(
        "ix_storage_items_digest",
        "storage_items",
        ["digest"],
        sqlite_where=_HAS_DIGEST,
        postgresql_where=_HAS_DIGEST,
    )
