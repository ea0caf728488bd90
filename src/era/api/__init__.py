"""The HTTP API: parse, one call of the core, answer."""
