"""The tables, in types that every dialect has. Changing them needs a migration beside; a test compares the two."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

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

sessions = Table(
    "sessions",
    metadata,
    Column("key", _Key, primary_key=True),
    Column("id", String(128), nullable=False, unique=True),
    Column("language", String(32), nullable=False),
    Column("persistent", Boolean, nullable=False),
    Column("data", Text, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("allow_internet", Boolean, nullable=False),
    Column("allow_public", Boolean, nullable=False),
    Column("default_timeout", Float, nullable=False),
    Column("code", Text),
    Column("code_description", Text),
    Column("code_updated_at", BigInteger),
    Column("version", BigInteger, nullable=False),
    Column("snapshot_root", String(64)),
    Column("file_count", BigInteger, nullable=False),
    Column("total_bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("last_run_at", BigInteger),
    sqlite_autoincrement=True,  # A key is never given twice, not even that of the newest row once it is deleted.
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
    Column("status", String(16), nullable=False, index=True),
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
    Index(None, "session_key", "key"),
    sqlite_autoincrement=True,
)
