"""The database: connections, dialects of SQLite and PostgreSQL, tables, counts."""
