"""A session's files, live or not: calls, archives, links, watching."""
