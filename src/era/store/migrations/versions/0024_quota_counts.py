"""What the hosts of a cluster count together for quotas."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "quota_runs",
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("subject", sa.String(64), nullable=False),
        sa.Column("begun", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("kind", "subject", name="pk_quota_runs"),
    )
    op.create_table(
        "quota_sandboxes",
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("subject", sa.String(64), nullable=False),
        sa.Column("session_id", sa.String(64), nullable=False),
        sa.Column("host_id", sa.String(64), nullable=False),
        sa.Column("memory", sa.BigInteger, nullable=False),
        sa.ForeignKeyConstraint(["host_id"], ["hosts.id"], name="fk_quota_sandboxes_host_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("kind", "subject", "session_id", "host_id", name="pk_quota_sandboxes"),
    )
