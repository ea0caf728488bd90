"""Records of processes beside runs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_IS_RUNNING = sa.text("status = 'running'")


def upgrade() -> None:
    op.create_table(
        "processes",
        sa.Column("key", _KEY, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("session_key", _KEY, nullable=False),
        sa.Column("tag", sa.String(64)),
        sa.Column("command", sa.Text, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("pid", sa.Integer),
        sa.Column("stdin", sa.Boolean, nullable=False),
        sa.Column("pty", sa.Boolean, nullable=False),
        sa.Column("started_at", sa.BigInteger, nullable=False),
        sa.Column("ended_at", sa.BigInteger),
        sa.Column("exit_code", sa.Integer),
        sa.Column("signal", sa.Integer),
        sa.Column("reason", sa.Text),
        sa.Column("output_bytes", sa.BigInteger, nullable=False),
        sa.Column("tail", sa.LargeBinary),
        sa.PrimaryKeyConstraint("key", name="pk_processes"),
        sa.UniqueConstraint("id", name="uq_processes_id"),
        sa.ForeignKeyConstraint(["session_key"], ["sessions.key"], name="fk_processes_session_key", ondelete="CASCADE"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_processes_session_key_key", "processes", ["session_key", "key"])
    op.create_index(
        "ix_processes_running", "processes", ["session_key"], sqlite_where=_IS_RUNNING, postgresql_where=_IS_RUNNING
    )
