"""Keys have scopes, an end, quotas and an earlier secret; owners have quotas; what is used is counted by day."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

_OF_KEY = sa.text("api_key_id IS NOT NULL AND deleted_at IS NULL")


def upgrade() -> None:
    for column in (
        sa.Column("scopes", sa.String(64), nullable=False, server_default="read run write"),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("quotas", sa.Text, nullable=False, server_default="{}"),
        sa.Column("old_digest", sa.String(64)),
        sa.Column("old_until", sa.BigInteger),
    ):
        op.add_column("api_keys", column)
    op.add_column("sessions", sa.Column("api_key_id", sa.String(64)))
    op.create_index(
        "ix_sessions_api_key_id", "sessions", ["api_key_id"], sqlite_where=_OF_KEY, postgresql_where=_OF_KEY
    )
    op.create_table(
        "owners",
        sa.Column("owner", sa.String(64), primary_key=True),
        sa.Column("quotas", sa.Text, nullable=False),
    )
    op.create_table(
        "usage",
        sa.Column("day", sa.BigInteger, primary_key=True),
        sa.Column("owner", sa.String(64), primary_key=True),
        sa.Column("key_id", sa.String(64), primary_key=True),
        sa.Column("runs", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("cpu_us", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("egress_bytes", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("storage_bytes", sa.BigInteger),
        sa.Column("disk_bytes", sa.BigInteger),
    )
