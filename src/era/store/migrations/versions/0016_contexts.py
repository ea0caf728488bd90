"""Contexts, and what runs in them answered."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "contexts",
        sa.Column("session_key", _KEY, nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("session_key", "name", name="pk_contexts"),
        sa.ForeignKeyConstraint(["session_key"], ["sessions.key"], name="fk_contexts_session_key", ondelete="CASCADE"),
        sqlite_with_rowid=False,
    )
    for table in ("outputs", "idempotency_keys"):
        op.add_column(table, sa.Column("cell", sa.LargeBinary))
        op.add_column(table, sa.Column("cell_digest", sa.String(64)))
