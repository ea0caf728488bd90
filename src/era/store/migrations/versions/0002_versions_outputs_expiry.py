"""Versions hold data and snapshots; outputs and idempotency keys; sessions that expire and can be restored."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_Key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    _add_versions()
    _change_sessions()
    _add_outputs()
    _add_idempotency_keys()


def _add_versions() -> None:
    op.create_table(
        "versions",
        sa.Column("session_key", _Key, nullable=False),
        sa.Column("n", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("cause", sa.String(16), nullable=False),
        sa.Column("run_id", sa.String(128)),
        sa.Column("snapshot_root", sa.String(64)),
        sa.Column("file_count", sa.BigInteger, nullable=False),
        sa.Column("total_bytes", sa.BigInteger, nullable=False),
        sa.Column("data", sa.Text, nullable=False),
        _of_session("versions"),
        sa.PrimaryKeyConstraint("session_key", "n", name="pk_versions"),
        sqlite_with_rowid=False,
    )
    # Of the versions so far only the last one is there.
    op.execute("""
        INSERT INTO versions
            (session_key, n, created_at, cause, run_id, snapshot_root, file_count, total_bytes, data)
        SELECT s.key, s.version, s.updated_at,
            CASE WHEN s.version = 1 THEN 'create' WHEN r.id IS NOT NULL THEN 'run' ELSE 'data' END,
            r.id, s.snapshot_root, s.file_count, s.total_bytes, s.data
        FROM sessions s
        LEFT JOIN runs r ON r.key = (
            SELECT max(key) FROM runs WHERE session_key = s.key AND version = s.version AND committed
        )
    """)


def _change_sessions() -> None:
    # SQLite makes the table anew, which would forget the highest key ever given.
    on_sqlite = op.get_bind().dialect.name == "sqlite"
    highest = op.get_bind().scalar(_HIGHEST_KEY) if on_sqlite else None
    with op.batch_alter_table("sessions", table_kwargs={"sqlite_autoincrement": True}) as table:
        table.drop_constraint("uq_sessions_id", type_="unique")
        for name in ("data", "snapshot_root", "file_count", "total_bytes"):
            table.drop_column(name)
        for name in ("ttl", "expires_at", "deleted_at"):
            table.add_column(sa.Column(name, sa.BigInteger))
        table.add_column(sa.Column("expired", sa.Boolean, nullable=False, server_default=sa.false()))
    if highest is not None:
        op.execute("DELETE FROM sqlite_sequence WHERE name = 'sessions'")
        op.execute(f"INSERT INTO sqlite_sequence (name, seq) VALUES ('sessions', {int(highest)})")  # noqa: S608
    _add_index("uq_sessions_id", ["id"], "deleted_at IS NULL", unique=True)
    _add_index("ix_sessions_gone_id", ["id", "key"], "deleted_at IS NOT NULL")
    _add_index("ix_sessions_deleted_at", ["deleted_at"], "deleted_at IS NOT NULL")
    _add_index("ix_sessions_expires_at", ["expires_at"], "expires_at IS NOT NULL")


_HIGHEST_KEY = sa.text("SELECT seq FROM sqlite_sequence WHERE name = 'sessions'")


def _add_index(name: str, columns: list[str], where: str, *, unique: bool = False) -> None:
    condition = sa.text(where)
    op.create_index(name, "sessions", columns, unique=unique, sqlite_where=condition, postgresql_where=condition)


def _add_outputs() -> None:
    op.create_table(
        "outputs",
        sa.Column("session_key", _Key, nullable=False),
        sa.Column("run_key", _Key, nullable=False),
        *_output_columns(),
        _of_session("outputs"),
        sa.PrimaryKeyConstraint("session_key", "run_key", name="pk_outputs"),
        sqlite_with_rowid=False,
    )


def _add_idempotency_keys() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("scope", sa.String(64), nullable=False),
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("request_hash", sa.String(64), nullable=False),
        sa.Column("env_mark", sa.String(128), nullable=False),
        sa.Column("session_key", _Key),
        sa.Column("run_id", sa.String(128)),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        *_output_columns(),
        sa.Column("answer", sa.Text),
        _of_session("idempotency_keys"),
        sa.PrimaryKeyConstraint("scope", "key", name="pk_idempotency_keys"),
    )
    op.create_index("ix_idempotency_keys_session_key", "idempotency_keys", ["session_key"])
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])


def _output_columns() -> list[sa.Column[object]]:
    return [
        sa.Column("stdout_digest", sa.String(64)),
        sa.Column("stderr_digest", sa.String(64)),
        sa.Column("stdout", sa.LargeBinary),
        sa.Column("stderr", sa.LargeBinary),
    ]


def _of_session(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["session_key"], ["sessions.key"], name=f"fk_{table}_session_key", ondelete="CASCADE"
    )
