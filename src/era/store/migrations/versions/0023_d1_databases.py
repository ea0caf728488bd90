"""Programs' SQL databases, where the hosts of a cluster share them by PostgreSQL."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None


def upgrade() -> None:
    key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "d1_databases",
        sa.Column("key", key, nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("namespace", sa.String(64), nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("mark", sa.String(32), nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_d1_databases"),
        sa.UniqueConstraint("owner", "namespace", name="uq_d1_databases_owner_namespace"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "d1_chunks",
        sa.Column("database_key", key, nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("content", sa.LargeBinary, nullable=False),
        sa.ForeignKeyConstraint(
            ["database_key"], ["d1_databases.key"], name="fk_d1_chunks_database_key", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("database_key", "number", name="pk_d1_chunks"),
    )
