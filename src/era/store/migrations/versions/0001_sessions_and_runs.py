"""Sessions and runs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_Key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "sessions",
        sa.Column("key", _Key, nullable=False),
        sa.Column("id", sa.String(128), nullable=False),
        sa.Column("language", sa.String(32), nullable=False),
        sa.Column("persistent", sa.Boolean, nullable=False),
        sa.Column("data", sa.Text, nullable=False),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("allow_internet", sa.Boolean, nullable=False),
        sa.Column("allow_public", sa.Boolean, nullable=False),
        sa.Column("default_timeout", sa.Float, nullable=False),
        sa.Column("code", sa.Text),
        sa.Column("code_description", sa.Text),
        sa.Column("code_updated_at", sa.BigInteger),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("snapshot_root", sa.String(64)),
        sa.Column("file_count", sa.BigInteger, nullable=False),
        sa.Column("total_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("last_run_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("key", name="pk_sessions"),
        sa.UniqueConstraint("id", name="uq_sessions_id"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "session_pairs",
        sa.Column("session_key", _Key, nullable=False),
        sa.Column("pair", sa.String(64), nullable=False),
        sa.ForeignKeyConstraint(
            ["session_key"], ["sessions.key"], name="fk_session_pairs_session_key", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("session_key", "pair", name="pk_session_pairs"),
    )
    op.create_index("ix_session_pairs_pair_session_key", "session_pairs", ["pair", "session_key"])
    op.create_table(
        "runs",
        sa.Column("key", _Key, nullable=False),
        sa.Column("id", sa.String(128), nullable=False),
        sa.Column("session_key", _Key, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("started_at", sa.BigInteger, nullable=False),
        sa.Column("ended_at", sa.BigInteger),
        sa.Column("exit_code", sa.Integer),
        sa.Column("duration_us", sa.BigInteger),
        sa.Column("stdout_bytes", sa.BigInteger, nullable=False),
        sa.Column("stderr_bytes", sa.BigInteger, nullable=False),
        sa.Column("stdout_truncated", sa.Boolean, nullable=False),
        sa.Column("stderr_truncated", sa.Boolean, nullable=False),
        sa.Column("committed", sa.Boolean, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("version", sa.BigInteger),
        sa.Column("peak_memory_bytes", sa.BigInteger),
        sa.Column("cpu_us", sa.BigInteger),
        sa.Column("reaped", sa.Integer),
        sa.Column("enforced", sa.Text, nullable=False),
        sa.ForeignKeyConstraint(["session_key"], ["sessions.key"], name="fk_runs_session_key", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("key", name="pk_runs"),
        sa.UniqueConstraint("id", name="uq_runs_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_runs_status", "runs", ["status"])
    op.create_index("ix_runs_session_key_key", "runs", ["session_key", "key"])
