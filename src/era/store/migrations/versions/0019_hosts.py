"""Hosts of a cluster, the homes of sessions, and which host leads."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "hosts",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("started_at", sa.BigInteger, nullable=False),
        sa.Column("heartbeat_at", sa.BigInteger, nullable=False),
        sa.Column("lease_us", sa.BigInteger, nullable=False),
        sa.Column("dead", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_hosts"),
    )
    op.create_table(
        "homes",
        sa.Column("session_key", key, nullable=False),
        sa.Column("host_id", sa.String(64), nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.ForeignKeyConstraint(["session_key"], ["sessions.key"], name="fk_homes_session_key", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("session_key", name="pk_homes"),
    )
    op.create_table(
        "leader",
        sa.Column("only", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("host_id", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("only", name="pk_leader"),
    )
