"""What was used is counted by host, so that hosts don't wait for each other with each run."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None

_COLUMNS = "day, owner, key_id, runs, cpu_us, egress_bytes, storage_bytes, disk_bytes"


def upgrade() -> None:
    # SQLite can't change a primary key, so the table is made anew.
    op.rename_table("usage", "usage_before")
    if op.get_bind().dialect.name != "sqlite":
        op.execute("ALTER INDEX pk_usage RENAME TO pk_usage_before")
    op.create_table(
        "usage",
        sa.Column("day", sa.BigInteger, primary_key=True),
        sa.Column("owner", sa.String(64), primary_key=True),
        sa.Column("key_id", sa.String(64), primary_key=True),
        sa.Column("host_id", sa.String(64), primary_key=True),
        sa.Column("runs", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("cpu_us", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("egress_bytes", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("storage_bytes", sa.BigInteger),
        sa.Column("disk_bytes", sa.BigInteger),
    )
    op.execute(f"INSERT INTO usage (host_id, {_COLUMNS}) SELECT '', {_COLUMNS} FROM usage_before")  # noqa: S608  ours
    op.drop_table("usage_before")
