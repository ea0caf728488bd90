"""The tables of the first version."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "v001"
down_revision = None
branch_labels = None
depends_on = None

_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    _add_sessions()
    _add_versions()
    _add_runs()
    _add_idempotency_keys()
    _add_processes()
    _add_hosts()
    _add_inboxes()
    _add_owners()
    _add_usage()
    _add_webhooks()
    _add_storage()


def _partial(name: str, *columns: str, where: str, unique: bool = False) -> sa.Index:
    """An index of the rows that fulfil a condition."""
    return sa.Index(name, *columns, unique=unique, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


def _add_sessions() -> None:
    op.create_table(
        "sessions",
        sa.Column("key", _KEY, primary_key=True),
        sa.Column("id", sa.String(128), nullable=False),
        sa.Column("owner", sa.String(64), nullable=False, server_default="default"),
        sa.Column("language", sa.String(32), nullable=False),
        sa.Column("persistent", sa.Boolean, nullable=False),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("allow_internet", sa.Boolean, nullable=False),
        sa.Column("allow_public", sa.Boolean, nullable=False),
        sa.Column("default_timeout", sa.Float, nullable=False),
        sa.Column("code", sa.Text),
        sa.Column("code_description", sa.Text),
        sa.Column("code_updated_at", sa.BigInteger),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("last_run_at", sa.BigInteger),
        sa.Column("history_bytes", sa.BigInteger),
        sa.Column("ttl", sa.BigInteger),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("deleted_at", sa.BigInteger),
        sa.Column("expired", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("limits", sa.Text, nullable=False, server_default="{}"),
        sa.Column("isolation", sa.String(16), nullable=False, server_default="auto"),
        sa.Column("egress", sa.Text, nullable=False, server_default="{}"),
        sa.Column("service", sa.Text),
        sa.Column("setup", sa.Text),
        sa.Column("setup_status", sa.String(16)),
        sa.Column("setup_result", sa.Text),
        sa.Column("environment", sa.String(64)),
        sa.Column("setup_lock", sa.Text),
        sa.Column("storage", sa.Boolean, nullable=False, server_default=sa.true()),
        sa.Column("api_key_id", sa.String(64)),
        sa.Column("record_code", sa.Boolean, nullable=False, server_default=sa.true()),
        _partial("ix_sessions_api_key_id", "api_key_id", where="api_key_id IS NOT NULL AND deleted_at IS NULL"),
        _partial("ix_sessions_deleted_at", "deleted_at", where="deleted_at IS NOT NULL"),
        _partial("ix_sessions_environment", "environment", where="environment IS NOT NULL"),
        _partial("ix_sessions_expires_at", "expires_at", where="expires_at IS NOT NULL AND deleted_at IS NULL"),
        _partial("ix_sessions_gone_id", "id", "key", where="deleted_at IS NOT NULL"),
        _partial("ix_sessions_owner", "owner", "key", where="deleted_at IS NULL"),
        _partial("ix_sessions_setup_status", "setup_status", where="setup_status IN ('pending', 'running')"),
        _partial("uq_sessions_id", "id", where="deleted_at IS NULL", unique=True),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "session_pairs",
        sa.Column("session_key", _KEY, sa.ForeignKey("sessions.key", ondelete="CASCADE"), primary_key=True),
        sa.Column("pair", sa.String(64), primary_key=True),
        sa.Index("ix_session_pairs_pair_session_key", "pair", "session_key"),
    )


def _add_versions() -> None:
    op.create_table(
        "versions",
        sa.Column("session_key", _KEY, sa.ForeignKey("sessions.key", ondelete="CASCADE"), primary_key=True),
        sa.Column("n", sa.BigInteger, primary_key=True),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("cause", sa.String(16), nullable=False),
        sa.Column("run_id", sa.String(128)),
        sa.Column("snapshot_root", sa.String(64)),
        sa.Column("file_count", sa.BigInteger, nullable=False),
        sa.Column("total_bytes", sa.BigInteger, nullable=False),
        sa.Column("data", sa.Text, nullable=False),
        _partial("ix_versions_checkpoints", "session_key", where="cause IN ('checkpoint', 'loose_checkpoint')"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "version_names",
        sa.Column("session_key", _KEY, primary_key=True),
        sa.Column("n", sa.BigInteger, primary_key=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.ForeignKeyConstraint(["session_key", "n"], ["versions.session_key", "versions.n"], ondelete="CASCADE"),
        sa.UniqueConstraint("session_key", "name"),
        sqlite_with_rowid=False,
    )


def _add_runs() -> None:
    op.create_table(
        "runs",
        sa.Column("key", _KEY, primary_key=True),
        sa.Column("id", sa.String(128), nullable=False),
        sa.Column("session_key", _KEY, sa.ForeignKey("sessions.key", ondelete="CASCADE"), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("started_at", sa.BigInteger, nullable=False),
        sa.Column("ended_at", sa.BigInteger),
        sa.Column("exit_code", sa.Integer),
        sa.Column("duration_us", sa.BigInteger),
        sa.Column("stdout_bytes", sa.BigInteger, nullable=False),
        sa.Column("stderr_bytes", sa.BigInteger, nullable=False),
        sa.Column("stdout_truncated", sa.Boolean, nullable=False),
        sa.Column("stderr_truncated", sa.Boolean, nullable=False),
        sa.Column("committed", sa.Boolean, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("version", sa.BigInteger),
        sa.Column("peak_memory_bytes", sa.BigInteger),
        sa.Column("cpu_us", sa.BigInteger),
        sa.Column("reaped", sa.Integer),
        sa.Column("enforced", sa.Text, nullable=False),
        sa.Column("egress", sa.Text, nullable=False, server_default="{}"),
        sa.Column("artifacts", sa.Text, nullable=False, server_default="{}"),
        sa.Column("versions_dropped", sa.Integer, nullable=False, server_default="0"),
        sa.Column("imported", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("pieces", sa.BigInteger),
        sa.Column("setup_error", sa.Text),
        sa.Column("invocation", sa.Text, nullable=False, server_default="{}"),
        sa.Column("code", sa.Text),
        sa.UniqueConstraint("id"),
        sa.Index("ix_runs_session_key_key", "session_key", "key"),
        sa.Index("ix_runs_status", "status", "imported"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "outputs",
        sa.Column("session_key", _KEY, sa.ForeignKey("sessions.key", ondelete="CASCADE"), primary_key=True),
        sa.Column("run_key", _KEY, primary_key=True),
        sa.Column("stdout_digest", sa.String(64)),
        sa.Column("stderr_digest", sa.String(64)),
        sa.Column("stdout", sa.LargeBinary),
        sa.Column("stderr", sa.LargeBinary),
        sa.Column("piece_order", sa.LargeBinary),
        sa.Column("piece_order_digest", sa.String(64)),
        sa.Column("cell", sa.LargeBinary),
        sa.Column("cell_digest", sa.String(64)),
        sqlite_with_rowid=False,
    )


def _add_idempotency_keys() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("scope", sa.String(128), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("request_hash", sa.String(64), nullable=False),
        sa.Column("env_mark", sa.String(128), nullable=False),
        sa.Column("session_key", _KEY, sa.ForeignKey("sessions.key", ondelete="CASCADE")),
        sa.Column("run_id", sa.String(128)),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("stdout_digest", sa.String(64)),
        sa.Column("stderr_digest", sa.String(64)),
        sa.Column("stdout", sa.LargeBinary),
        sa.Column("stderr", sa.LargeBinary),
        sa.Column("answer", sa.Text),
        sa.Column("piece_order", sa.LargeBinary),
        sa.Column("piece_order_digest", sa.String(64)),
        sa.Column("cell", sa.LargeBinary),
        sa.Column("cell_digest", sa.String(64)),
        sa.Column("answer_bytes", sa.BigInteger),
        _partial(
            "ix_idempotency_keys_answer_bytes", "scope", "created_at", "answer_bytes", where="answer_bytes IS NOT NULL"
        ),
        sa.Index("ix_idempotency_keys_created_at", "created_at"),
        sa.Index("ix_idempotency_keys_session_key", "session_key"),
    )


def _add_processes() -> None:
    op.create_table(
        "processes",
        sa.Column("key", _KEY, primary_key=True),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("session_key", _KEY, sa.ForeignKey("sessions.key", ondelete="CASCADE"), nullable=False),
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
        sa.UniqueConstraint("id"),
        _partial("ix_processes_running", "session_key", where="status = 'running'"),
        sa.Index("ix_processes_session_key_key", "session_key", "key"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "contexts",
        sa.Column("session_key", _KEY, sa.ForeignKey("sessions.key", ondelete="CASCADE"), primary_key=True),
        sa.Column("name", sa.String(64), primary_key=True),
        sqlite_with_rowid=False,
    )


def _add_hosts() -> None:
    op.create_table(
        "hosts",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("started_at", sa.BigInteger, nullable=False),
        sa.Column("heartbeat_at", sa.BigInteger, nullable=False),
        sa.Column("lease_us", sa.BigInteger, nullable=False),
        sa.Column("dead", sa.Boolean, nullable=False),
    )
    op.create_table(
        "homes",
        sa.Column("session_key", _KEY, sa.ForeignKey("sessions.key", ondelete="CASCADE"), primary_key=True),
        sa.Column("host_id", sa.String(64), nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Index("ix_homes_host_id", "host_id"),
    )
    op.create_table(
        "leader",
        sa.Column("only", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("host_id", sa.String(64), nullable=False),
    )
    op.create_table(
        "condemned",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("collection", sa.String(32)),
        sa.Column("gone_at", sa.BigInteger, nullable=False),
        sa.Column("kept_until", sa.BigInteger, nullable=False),
    )


def _add_inboxes() -> None:
    op.create_table(
        "inboxes",
        sa.Column("session_key", _KEY, sa.ForeignKey("sessions.key", ondelete="CASCADE"), primary_key=True),
        sa.Column("scheme", sa.String(16)),
        sa.Column("header", sa.String(128)),
        sa.Column("secret", sa.Text),
        sa.Column("retries", sa.Integer, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "deliveries",
        sa.Column("key", _KEY, primary_key=True),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("session_key", _KEY, sa.ForeignKey("sessions.key", ondelete="CASCADE"), nullable=False),
        sa.Column("sender_id", sa.String(255)),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("run_ids", sa.Text, nullable=False),
        sa.Column("received_at", sa.BigInteger, nullable=False),
        sa.Column("next_attempt_at", sa.BigInteger),
        sa.Column("ended_at", sa.BigInteger),
        sa.Column("answer_status", sa.Integer),
        sa.Column("reason", sa.Text),
        sa.Column("size", sa.Integer, nullable=False),
        sa.Column("method", sa.String(32), nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("query", sa.Text, nullable=False),
        sa.Column("base_url", sa.Text, nullable=False),
        sa.Column("headers", sa.Text, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("id"),
        _partial("ix_deliveries_pending", "session_key", where="status = 'pending'"),
        _partial("ix_deliveries_running", "session_key", where="status = 'running'"),
        sa.Index("ix_deliveries_session_key_key", "session_key", "key"),
        sa.Index("ix_deliveries_session_key_sender_id", "session_key", "sender_id", unique=True),
        sa.Index("ix_deliveries_session_key_status_position_size", "session_key", "status", "position", "size"),
        sqlite_autoincrement=True,
    )


def _add_owners() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("scopes", sa.String(64), nullable=False, server_default="read run write"),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("quotas", sa.Text, nullable=False, server_default="{}"),
        sa.Column("old_digest", sa.String(64)),
        sa.Column("old_until", sa.BigInteger),
        sa.UniqueConstraint("digest"),
    )
    op.create_table(
        "owners",
        sa.Column("owner", sa.String(64), primary_key=True),
        sa.Column("quotas", sa.Text, nullable=False),
    )
    op.create_table(
        "audit",
        sa.Column("key", _KEY, primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("target", sa.String(128), nullable=False),
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("details", sa.Text, nullable=False),
        sa.UniqueConstraint("owner", "number"),
    )


def _add_usage() -> None:
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
    op.create_table(
        "quota_runs",
        sa.Column("kind", sa.String(8), primary_key=True),
        sa.Column("subject", sa.String(64), primary_key=True),
        sa.Column("begun", sa.Text, nullable=False),
    )
    op.create_table(
        "quota_sandboxes",
        sa.Column("kind", sa.String(8), primary_key=True),
        sa.Column("subject", sa.String(64), primary_key=True),
        sa.Column("session_id", sa.String(128), primary_key=True),
        sa.Column("host_id", sa.String(64), sa.ForeignKey("hosts.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("memory", sa.BigInteger, nullable=False),
    )


def _add_webhooks() -> None:
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("events", sa.Text, nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("dropped", sa.BigInteger, nullable=False, server_default="0"),
        sa.Index("ix_webhooks_owner", "owner"),
    )
    op.create_table(
        "webhook_notices",
        sa.Column("key", _KEY, primary_key=True),
        sa.Column("id", sa.String(128), nullable=False),
        sa.Column("webhook_id", sa.String(64), nullable=False),
        sa.Column("event", sa.String(32), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("tries", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("next_attempt_at", sa.BigInteger),
        sa.Column("ended_at", sa.BigInteger),
        sa.Column("http_status", sa.BigInteger),
        sa.Column("reason", sa.Text),
        _partial("ix_webhook_notices_pending", "webhook_id", "key", where="status = 'pending'"),
        sa.Index("ix_webhook_notices_webhook_id", "webhook_id", "key"),
        sqlite_autoincrement=True,
    )


def _add_storage() -> None:
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
        _partial("ix_storage_items_digest", "digest", where="digest IS NOT NULL"),
    )
    op.create_table(
        "d1_databases",
        sa.Column("key", _KEY, primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("namespace", sa.String(64), nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("mark", sa.String(32), nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("owner", "namespace"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "d1_chunks",
        sa.Column("database_key", _KEY, sa.ForeignKey("d1_databases.key", ondelete="CASCADE"), primary_key=True),
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("content", sa.LargeBinary, nullable=False),
    )
