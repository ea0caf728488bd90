"""Sandboxes count for quotas whatever the length of their session's id, which may have 128 characters.

Hosts of the version before can go on beside it. On PostgreSQL the next call of each that counts is a 503, though, which
may be made again: what it had prepared was for the column as it was.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0029"
down_revision = "0028"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("quota_sandboxes") as table:  # SQLite's is made anew
        table.alter_column("session_id", existing_type=sa.String(64), type_=sa.String(128), existing_nullable=False)
