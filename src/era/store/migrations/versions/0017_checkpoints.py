"""Which versions are checkpoints."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

_IS_CHECKPOINT = sa.text("cause IN ('checkpoint', 'loose_checkpoint')")


def upgrade() -> None:
    op.create_index(
        "ix_versions_checkpoints",
        "versions",
        ["session_key"],
        sqlite_where=_IS_CHECKPOINT,
        postgresql_where=_IS_CHECKPOINT,
    )
