"""Which host a session is at, and sessions that move to another."""
