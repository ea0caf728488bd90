"""The tables, in types that every dialect has. A change needs a migration in migrations/; a test compares the two."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    literal_column,
    text,
    true,
)

from era.core.models import DEFAULT_OWNER

# SQLite gives automatic keys to the exact type INTEGER only, which there holds 64 bits anyway.
_Key = BigInteger().with_variant(Integer(), "sqlite")

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# A session that expired or was deleted is removed: it stays for a while, with `deleted_at` set; its id is free at once.
_IS_PRESENT = text("deleted_at IS NULL")
_IS_REMOVED = text("deleted_at IS NOT NULL")
_HAS_EXPIRY = text("expires_at IS NOT NULL AND deleted_at IS NULL")
_HAS_PACKAGES = text("environment IS NOT NULL")
_OF_KEY = text("api_key_id IS NOT NULL AND deleted_at IS NULL")
_HAS_DIGEST = text("digest IS NOT NULL")
_HAS_ANSWER = text("answer_bytes IS NOT NULL")
_IS_RUNNING = text("status = 'running'")
_IS_PENDING = text("status = 'pending'")
IS_CHECKPOINT = text("versions.cause IN ('checkpoint', 'loose_checkpoint')")
IS_NO_CHECKPOINT = text("versions.cause NOT IN ('checkpoint', 'loose_checkpoint')")
_IS_CHECKPOINT = text("cause IN ('checkpoint', 'loose_checkpoint')")


def has_status(table: Table, status: str) -> ColumnElement[bool]:
    """Whether a row has this status, with the status in the statement's text. As a parameter it isn't known when
    PostgreSQL plans a statement for all of its values: it would take one that few rows have for one that many have, and
    read them all. Raises ValueError where it isn't a plain name."""
    if not status.isidentifier():
        raise ValueError(f"{status!r} is no status")
    # Without a type: to a Boolean SQLAlchemy would append `= 1` for SQLite, which then overlooks the indexes on it.
    return literal_column(f"{table.name}.status = '{status}'")


SETUP_UNDER_WAY = text("setup_status IN ('pending', 'running')")
"""Written out in queries too, or else SQLite wouldn't use the index on it."""

sessions = Table(
    "sessions",
    metadata,
    Column("key", _Key, primary_key=True),
    Column("id", String(128), nullable=False),
    Column("owner", String(64), nullable=False, server_default=DEFAULT_OWNER),
    Column("language", String(32), nullable=False),
    Column("persistent", Boolean, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("allow_internet", Boolean, nullable=False),
    Column("allow_public", Boolean, nullable=False),
    Column("default_timeout", Float, nullable=False),
    Column("code", Text),
    Column("code_description", Text),
    Column("code_updated_at", BigInteger),
    Column("version", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("last_run_at", BigInteger),
    Column("history_bytes", BigInteger),  # At most so much is held by its kept versions; NULL where it isn't known.
    Column("ttl", BigInteger),
    Column("expires_at", BigInteger),
    Column("deleted_at", BigInteger),
    Column("expired", Boolean, nullable=False, server_default=false()),
    Column("limits", Text, nullable=False, server_default="{}"),
    Column("isolation", String(16), nullable=False, server_default="auto"),
    Column("egress", Text, nullable=False, server_default="{}"),
    Column("service", Text),
    Column("setup", Text),
    Column("setup_status", String(16)),
    Column("setup_result", Text),
    Column("environment", String(64), key="package_set"),
    Column("setup_lock", Text),
    Column("storage", Boolean, nullable=False, server_default=true()),
    Column("api_key_id", String(64)),  # That it was made with, if that isn't the operator's.
    Column("record_code", Boolean, nullable=False, server_default=true()),
    Index("uq_sessions_id", "id", unique=True, sqlite_where=_IS_PRESENT, postgresql_where=_IS_PRESENT),
    Index("ix_sessions_owner", "owner", "key", sqlite_where=_IS_PRESENT, postgresql_where=_IS_PRESENT),
    Index("ix_sessions_api_key_id", "api_key_id", sqlite_where=_OF_KEY, postgresql_where=_OF_KEY),
    Index("ix_sessions_gone_id", "id", "key", sqlite_where=_IS_REMOVED, postgresql_where=_IS_REMOVED),
    Index("ix_sessions_deleted_at", "deleted_at", sqlite_where=_IS_REMOVED, postgresql_where=_IS_REMOVED),
    # Partial, so that the end of a run needn't touch it for the many sessions that never expire.
    Index("ix_sessions_expires_at", "expires_at", sqlite_where=_HAS_EXPIRY, postgresql_where=_HAS_EXPIRY),
    Index("ix_sessions_setup_status", "setup_status", sqlite_where=SETUP_UNDER_WAY, postgresql_where=SETUP_UNDER_WAY),
    Index("ix_sessions_environment", "package_set", sqlite_where=_HAS_PACKAGES, postgresql_where=_HAS_PACKAGES),
    sqlite_autoincrement=True,  # A key is never given twice, not even that of the newest row once it is deleted.
)

# Data and snapshot of every version that is kept; `sessions.version` is the number of the current one. `data` comes
# last because it may be long, and SQLite reads a row from its front.
versions = Table(
    "versions",
    metadata,
    Column("session_key", _Key, ForeignKey(sessions.c.key, ondelete="CASCADE"), primary_key=True),
    Column("n", BigInteger, primary_key=True),
    Column("created_at", BigInteger, nullable=False),
    Column("cause", String(16), nullable=False),
    Column("run_id", String(128)),
    Column("snapshot_root", String(64)),
    Column("file_count", BigInteger, nullable=False),
    Column("total_bytes", BigInteger, nullable=False),
    Column("data", Text, nullable=False),
    # Few sessions have any, so a commit finds out at once whether one has.
    Index("ix_versions_checkpoints", "session_key", sqlite_where=_IS_CHECKPOINT, postgresql_where=_IS_CHECKPOINT),
    sqlite_with_rowid=False,
)

# The names of versions that have one. They are a table of their own because SQLite reads a row from its front, and a
# new column would stand behind the version's data, which may be long.
version_names = Table(
    "version_names",
    metadata,
    Column("session_key", _Key, primary_key=True),
    Column("n", BigInteger, primary_key=True),
    Column("name", String(128), nullable=False),
    ForeignKeyConstraint(["session_key", "n"], [versions.c.session_key, versions.c.n], ondelete="CASCADE"),
    UniqueConstraint("session_key", "name"),
    sqlite_with_rowid=False,
)

# One row for each `metadata.KEY=VALUE` that finds a session. The pair is kept as a digest, so that a filter is one
# lookup in an index, any key is a literal one, and no length or character in either can trouble a database.
session_pairs = Table(
    "session_pairs",
    metadata,
    Column("session_key", _Key, ForeignKey(sessions.c.key, ondelete="CASCADE"), primary_key=True),
    Column("pair", String(64), primary_key=True),
    Index(None, "pair", "session_key"),
)

runs = Table(
    "runs",
    metadata,
    Column("key", _Key, primary_key=True),
    Column("id", String(128), nullable=False, unique=True),
    Column("session_key", _Key, ForeignKey(sessions.c.key, ondelete="CASCADE"), nullable=False),
    Column("status", String(16), nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
    Column("exit_code", Integer),
    Column("duration_us", BigInteger),
    Column("stdout_bytes", BigInteger, nullable=False),
    Column("stderr_bytes", BigInteger, nullable=False),
    Column("stdout_truncated", Boolean, nullable=False),
    Column("stderr_truncated", Boolean, nullable=False),
    Column("committed", Boolean, nullable=False),
    Column("reason", Text),
    Column("version", BigInteger),
    Column("peak_memory_bytes", BigInteger),
    Column("cpu_us", BigInteger),
    Column("reaped", Integer),
    Column("enforced", Text, nullable=False),
    Column("egress", Text, nullable=False, server_default="{}"),
    Column("artifacts", Text, nullable=False, server_default="{}"),
    Column("versions_dropped", Integer, nullable=False, server_default="0"),
    Column("imported", Boolean, nullable=False, server_default=false()),  # Whether it ran on another server.
    Column("pieces", BigInteger),
    Column("setup_error", Text),
    Column("invocation", Text, nullable=False, server_default="{}"),
    Column("code", Text),  # The last column, as it may be long, and SQLite reads a row from its front.
    Index(None, "session_key", "key"),
    Index("ix_runs_status", "status", "imported"),
    sqlite_autoincrement=True,
)

# Hosts of a cluster, each start of one under another id. A dead one never comes back. Times are the database's.
hosts = Table(
    "hosts",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("url", Text, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("heartbeat_at", BigInteger, nullable=False),
    Column("lease_us", BigInteger, nullable=False),
    Column("dead", Boolean, nullable=False),
)

# At which host a session is at home. No row, or one of a host that is dead or gone: whoever needs it first takes it.
homes = Table(
    "homes",
    metadata,
    Column("session_key", _Key, ForeignKey(sessions.c.key, ondelete="CASCADE"), primary_key=True),
    Column("host_id", String(64), nullable=False, index=True),
    Column("epoch", BigInteger, nullable=False),
)

# The host that does what is to be done once in the cluster: one row at most.
leader = Table(
    "leader",
    metadata,
    Column("only", Integer, primary_key=True, autoincrement=False),
    Column("host_id", String(64), nullable=False),
)

# Processes beside runs: those that run, and a session's last ended ones with the end of what they wrote.
processes = Table(
    "processes",
    metadata,
    Column("key", _Key, primary_key=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("session_key", _Key, ForeignKey(sessions.c.key, ondelete="CASCADE"), nullable=False),
    Column("tag", String(64)),
    Column("command", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("pid", Integer),
    Column("stdin", Boolean, nullable=False),
    Column("pty", Boolean, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
    Column("exit_code", Integer),
    Column("signal", Integer),
    Column("reason", Text),
    Column("output_bytes", BigInteger, nullable=False),
    Column("tail", LargeBinary),
    Index(None, "session_key", "key"),
    Index("ix_processes_running", "session_key", sqlite_where=_IS_RUNNING, postgresql_where=_IS_RUNNING),
    sqlite_autoincrement=True,
)

# The names of contexts that have had cells: what those made is lost where no interpreter has the name any more.
contexts = Table(
    "contexts",
    metadata,
    Column("session_key", _Key, ForeignKey(sessions.c.key, ondelete="CASCADE"), primary_key=True),
    Column("name", String(64), primary_key=True),
    sqlite_with_rowid=False,
)

# What runs wrote, for a session's newest runs, and only where they wrote anything. Each stream is stored in the row or,
# where it is long, as a blob whose digest the row has.
outputs = Table(
    "outputs",
    metadata,
    Column("session_key", _Key, ForeignKey(sessions.c.key, ondelete="CASCADE"), primary_key=True),
    Column("run_key", _Key, primary_key=True),
    Column("stdout_digest", String(64)),
    Column("stderr_digest", String(64)),
    Column("stdout", LargeBinary),
    Column("stderr", LargeBinary),
    Column("piece_order", LargeBinary),  # NULL as its digest where the pieces are in the plain order
    Column("piece_order_digest", String(64)),
    Column("cell", LargeBinary),  # what a run in a context answered besides, NULL as its digest for other runs
    Column("cell_digest", String(64)),
    sqlite_with_rowid=False,
)

# Idempotency keys and what their requests were answered. `answer` is the session that was made, or the data that a run
# answered (NULL: not yet; '': it isn't kept any more; the rest of its answer is its record). A run's env is here as
# `env_mark` only, which no process but the one that made it can compare.
idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("scope", String(128), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("request_hash", String(64), nullable=False),
    Column("env_mark", String(128), nullable=False),
    Column("session_key", _Key, ForeignKey(sessions.c.key, ondelete="CASCADE"), index=True),
    Column("run_id", String(128)),
    Column("created_at", BigInteger, nullable=False, index=True),
    Column("stdout_digest", String(64)),
    Column("stderr_digest", String(64)),
    Column("stdout", LargeBinary),
    Column("stderr", LargeBinary),
    Column("answer", Text),
    Column("piece_order", LargeBinary),
    Column("piece_order_digest", String(64)),
    Column("cell", LargeBinary),
    Column("cell_digest", String(64)),
    Column("answer_bytes", BigInteger),  # what it takes, blobs included; NULL where there is no answer (any more)
    Index(
        "ix_idempotency_keys_answer_bytes",
        *("scope", "created_at", "answer_bytes"),
        sqlite_where=_HAS_ANSWER,
        postgresql_where=_HAS_ANSWER,
    ),
)

# A session's settings for deliveries of webhooks. `secret` is needed in clear, to verify them; no answer and no capsule
# has it.
inboxes = Table(
    "inboxes",
    metadata,
    Column("session_key", _Key, ForeignKey(sessions.c.key, ondelete="CASCADE"), primary_key=True),
    Column("scheme", String(16)),
    Column("header", String(128)),
    Column("secret", Text),
    Column("retries", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
)

# Deliveries of webhooks, run in the order of `position`. The content comes last: it is long, and few queries read it.
deliveries = Table(
    "deliveries",
    metadata,
    Column("key", _Key, primary_key=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("session_key", _Key, ForeignKey(sessions.c.key, ondelete="CASCADE"), nullable=False),
    Column("sender_id", String(255)),
    Column("position", BigInteger, nullable=False),
    Column("status", String(16), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("run_ids", Text, nullable=False),
    Column("received_at", BigInteger, nullable=False),
    Column("next_attempt_at", BigInteger),
    Column("ended_at", BigInteger),
    Column("answer_status", Integer),
    Column("reason", Text),
    Column("size", Integer, nullable=False),
    Column("method", String(32), nullable=False),
    Column("path", Text, nullable=False),
    Column("query", Text, nullable=False),
    Column("base_url", Text, nullable=False),
    Column("headers", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Index(None, "session_key", "sender_id", unique=True),
    Index(None, "session_key", "status", "position", "size"),
    Index(None, "session_key", "key"),
    Index("ix_deliveries_pending", "session_key", sqlite_where=_IS_PENDING, postgresql_where=_IS_PENDING),
    Index("ix_deliveries_running", "session_key", sqlite_where=_IS_RUNNING, postgresql_where=_IS_RUNNING),
    sqlite_autoincrement=True,
)

# API keys, with which owners call the API, as digests: a key is 256 random bits, so no key is found from its digest.
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("description", Text, nullable=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("scopes", String(64), nullable=False, server_default="read run write"),
    Column("expires_at", BigInteger),
    Column("quotas", Text, nullable=False, server_default="{}"),
    Column("old_digest", String(64)),  # The digest before the last rotation, which lets in until `old_until`.
    Column("old_until", BigInteger),
)

# What was set for owners, as JSON. An owner without a row has the defaults.
owners = Table(
    "owners",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("quotas", Text, nullable=False),
)

# What was used on each day (since 1970, in UTC), by owner, key and host; `key_id` is empty for what came without one.
# The last two are the most that was measured that day, in rows without a key.
usage = Table(
    "usage",
    metadata,
    Column("day", BigInteger, primary_key=True),
    Column("owner", String(64), primary_key=True),
    Column("key_id", String(64), primary_key=True),
    Column("host_id", String(64), primary_key=True),  # of the host that counted it; empty outside of a cluster
    Column("runs", BigInteger, nullable=False, server_default="0"),
    Column("cpu_us", BigInteger, nullable=False, server_default="0"),
    Column("egress_bytes", BigInteger, nullable=False, server_default="0"),
    Column("storage_bytes", BigInteger),
    Column("disk_bytes", BigInteger),
)

# What hosts of a cluster count together for quotas (quota_counts.py): when the runs of the last minute began, as JSON,
quota_runs = Table(
    "quota_runs",
    metadata,
    Column("kind", String(8), primary_key=True),
    Column("subject", String(64), primary_key=True),
    Column("begun", Text, nullable=False),
)

# and the sandboxes in use, which count as long as their host isn't dead.
quota_sandboxes = Table(
    "quota_sandboxes",
    metadata,
    Column("kind", String(8), primary_key=True),
    Column("subject", String(64), primary_key=True),
    Column("session_id", String(128), primary_key=True),
    Column("host_id", String(64), ForeignKey(hosts.c.id, ondelete="CASCADE"), primary_key=True),
    Column("memory", BigInteger, nullable=False),
)

# What owners did. `number` counts an owner's entries, so that the oldest can be dropped.
audit = Table(
    "audit",
    metadata,
    Column("key", _Key, primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("action", String(32), nullable=False),
    Column("target", String(128), nullable=False),
    Column("request_id", String(64), nullable=False),
    Column("details", Text, nullable=False),
    UniqueConstraint("owner", "number"),
)

# Where owners are told what happens to what is theirs. `events` are separated by spaces.
webhooks = Table(
    "webhooks",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("url", Text, nullable=False),
    Column("events", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("dropped", BigInteger, nullable=False, server_default="0"),
    Index("ix_webhooks_owner", "owner"),
)

# What was or is to be told.
webhook_notices = Table(
    "webhook_notices",
    metadata,
    Column("key", _Key, primary_key=True),
    Column("id", String(128), nullable=False),
    Column("webhook_id", String(64), nullable=False),
    Column("event", String(32), nullable=False),
    Column("body", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("tries", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("next_attempt_at", BigInteger),
    Column("ended_at", BigInteger),
    Column("http_status", BigInteger),
    Column("reason", Text),
    Index("ix_webhook_notices_webhook_id", "webhook_id", "key"),
    Index(
        "ix_webhook_notices_pending",
        "webhook_id",
        "key",
        sqlite_where=_IS_PENDING,
        postgresql_where=_IS_PENDING,
    ),
    sqlite_autoincrement=True,  # So that no try is taken for that of another notice.
)

# Values that the sessions of an owner share, of the kinds `kv` and `r2`. Each is stored in the row or, where it is
# long, as a blob whose digest the row has. Keys are bytes, so that every database sorts them the same.
storage_items = Table(
    "storage_items",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("kind", String(2), primary_key=True),
    Column("namespace", String(64), primary_key=True),
    Column("key", LargeBinary, primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("metadata", Text),
    Column("digest", String(64)),
    Column("value", LargeBinary),
    Index("ix_storage_items_digest", "digest", sqlite_where=_HAS_DIGEST, postgresql_where=_HAS_DIGEST),
)

# Programs' SQL databases where hosts share them (d1_replicas.py); `mark` is another one after each change.
d1_databases = Table(
    "d1_databases",
    metadata,
    Column("key", _Key, primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("namespace", String(64), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("mark", String(32), nullable=False),
    Column("size", BigInteger, nullable=False),
    UniqueConstraint("owner", "namespace"),
    sqlite_autoincrement=True,  # So that no copy is taken for that of another database.
)

d1_chunks = Table(
    "d1_chunks",
    metadata,
    Column("database_key", _Key, ForeignKey("d1_databases.key", ondelete="CASCADE"), primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("version", BigInteger, nullable=False),
    Column("content", LargeBinary, nullable=False),
)

# Content in a bucket that a host of a cluster is to remove, or has removed (condemned.py): which collection is to, NULL
# for none; until when a removal may have gone on, 0 where there was none; and until when none may begin.
condemned = Table(
    "condemned",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("collection", String(32)),
    Column("gone_at", BigInteger, nullable=False),
    Column("kept_until", BigInteger, nullable=False),
)
