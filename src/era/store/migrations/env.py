"""Run by alembic for each command; the connection comes from `upgrade`, already in a transaction."""

from __future__ import annotations

from alembic import context

from era.store.engine.tables import metadata

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    render_as_batch=connection.dialect.name == "sqlite",
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
