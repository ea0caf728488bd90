"""Names of versions, and what a session's versions hold at most."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "version_names",
        sa.Column("session_key", _KEY, nullable=False),
        sa.Column("n", sa.BigInteger, nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.PrimaryKeyConstraint("session_key", "n", name="pk_version_names"),
        sa.ForeignKeyConstraint(
            ["session_key", "n"],
            ["versions.session_key", "versions.n"],
            name="fk_version_names_session_key_n",
            ondelete="CASCADE",
        ),
        sa.UniqueConstraint("session_key", "name", name="uq_version_names_session_key_name"),
        sqlite_with_rowid=False,
    )
    op.add_column("sessions", sa.Column("history_bytes", sa.BigInteger))
    op.add_column("runs", sa.Column("versions_dropped", sa.Integer, nullable=False, server_default="0"))
