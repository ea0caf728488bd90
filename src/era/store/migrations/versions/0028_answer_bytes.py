"""How much the answers to idempotency keys take, so that they have a bound."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None

_HAS_ANSWER = sa.text("answer_bytes IS NOT NULL")


def upgrade() -> None:
    op.add_column("idempotency_keys", sa.Column("answer_bytes", sa.BigInteger))
    op.create_index(
        "ix_idempotency_keys_answer_bytes",
        "idempotency_keys",
        ["scope", "created_at", "answer_bytes"],
        sqlite_where=_HAS_ANSWER,
        postgresql_where=_HAS_ANSWER,
    )
