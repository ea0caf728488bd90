"""Inboxes for webhooks, and what was delivered to them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_Key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "inboxes",
        sa.Column("session_key", _Key, nullable=False),
        sa.Column("scheme", sa.String(16)),
        sa.Column("header", sa.String(128)),
        sa.Column("secret", sa.Text),
        sa.Column("retries", sa.Integer, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.ForeignKeyConstraint(["session_key"], ["sessions.key"], name="fk_inboxes_session_key", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("session_key", name="pk_inboxes"),
    )
    op.create_table(
        "deliveries",
        sa.Column("key", _Key, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("session_key", _Key, nullable=False),
        sa.Column("sender_id", sa.String(255)),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("run_ids", sa.Text, nullable=False),
        sa.Column("received_at", sa.BigInteger, nullable=False),
        sa.Column("next_attempt_at", sa.BigInteger),
        sa.Column("ended_at", sa.BigInteger),
        sa.Column("answer_status", sa.Integer),
        sa.Column("reason", sa.Text),
        sa.Column("size", sa.Integer, nullable=False),
        sa.Column("method", sa.String(32), nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("query", sa.Text, nullable=False),
        sa.Column("base_url", sa.Text, nullable=False),
        sa.Column("headers", sa.Text, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.ForeignKeyConstraint(
            ["session_key"], ["sessions.key"], name="fk_deliveries_session_key", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("key", name="pk_deliveries"),
        sa.UniqueConstraint("id", name="uq_deliveries_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_deliveries_session_key_sender_id", "deliveries", ["session_key", "sender_id"], unique=True)
    op.create_index(
        "ix_deliveries_session_key_status_position_size",
        "deliveries",
        ["session_key", "status", "position", "size"],
    )
    op.create_index("ix_deliveries_session_key_key", "deliveries", ["session_key", "key"])
