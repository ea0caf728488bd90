"""How much the blobs of answers to idempotency keys hold, so that a session's have a bound."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None

_HAS_BLOBS = sa.text("blob_bytes IS NOT NULL")


def upgrade() -> None:
    op.add_column("idempotency_keys", sa.Column("blob_bytes", sa.BigInteger))
    op.create_index(
        "ix_idempotency_keys_blob_bytes",
        "idempotency_keys",
        ["session_key", "created_at"],
        sqlite_where=_HAS_BLOBS,
        postgresql_where=_HAS_BLOBS,
    )
