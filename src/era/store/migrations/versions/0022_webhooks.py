"""Webhooks of owners, and what is to be told to them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None

_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_PENDING = sa.text("status = 'pending'")


def upgrade() -> None:
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("events", sa.Text, nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("dropped", sa.BigInteger, nullable=False, server_default="0"),
    )
    op.create_table(
        "webhook_notices",
        sa.Column("key", _KEY, primary_key=True),
        sa.Column("id", sa.String(128), nullable=False),
        sa.Column("webhook_id", sa.String(64), nullable=False),
        sa.Column("event", sa.String(32), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("tries", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("next_attempt_at", sa.BigInteger),
        sa.Column("ended_at", sa.BigInteger),
        sa.Column("http_status", sa.BigInteger),
        sa.Column("reason", sa.Text),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_webhook_notices_webhook_id", "webhook_notices", ["webhook_id", "key"])
    op.create_index(
        "ix_webhook_notices_pending",
        "webhook_notices",
        ["webhook_id", "key"],
        sqlite_where=_PENDING,
        postgresql_where=_PENDING,
    )
