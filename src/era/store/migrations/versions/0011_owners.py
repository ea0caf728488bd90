"""Sessions and storage belong to owners, who have keys; sessions can be without storage.

What there is so far belongs to the owner `default`.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_LIVE = sa.text("deleted_at IS NULL")
_HAS_DIGEST = sa.text("digest IS NOT NULL")


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False, unique=True),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )
    op.add_column("sessions", sa.Column("owner", sa.String(64), nullable=False, server_default="default"))
    op.add_column("sessions", sa.Column("storage", sa.Boolean, nullable=False, server_default=sa.true()))
    op.create_index("ix_sessions_owner", "sessions", ["owner", "key"], sqlite_where=_LIVE, postgresql_where=_LIVE)
    _scope_keys_by_owner()
    _add_owner_to_storage()


def _scope_keys_by_owner() -> None:
    with op.batch_alter_table("idempotency_keys") as table:
        table.alter_column("scope", existing_type=sa.String(64), type_=sa.String(128), existing_nullable=False)
    op.execute("UPDATE idempotency_keys SET scope = 'create:default' WHERE scope = 'create'")


def _add_owner_to_storage() -> None:
    # SQLite can't change a primary key, so the table is made anew there.
    op.rename_table("storage_items", "storage_items_before")
    op.drop_index("ix_storage_items_digest", "storage_items_before")
    if op.get_bind().dialect.name != "sqlite":
        op.execute("ALTER INDEX pk_storage_items RENAME TO pk_storage_items_before")
    op.create_table(
        "storage_items",
        sa.Column("owner", sa.String(64), primary_key=True),
        sa.Column("kind", sa.String(2), primary_key=True),
        sa.Column("namespace", sa.String(64), primary_key=True),
        sa.Column("key", sa.LargeBinary, primary_key=True),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("metadata", sa.Text),
        sa.Column("digest", sa.String(64)),
        sa.Column("value", sa.LargeBinary),
    )
    columns = "kind, namespace, key, size, created_at, updated_at, metadata, digest, value"
    op.execute(
        f"INSERT INTO storage_items (owner, {columns}) SELECT 'default', {columns} FROM storage_items_before"  # noqa: S608  ours
    )
    op.drop_table("storage_items_before")
    op.create_index(
        "ix_storage_items_digest",
        "storage_items",
        ["digest"],
        sqlite_where=_HAS_DIGEST,
        postgresql_where=_HAS_DIGEST,
    )
