"""The `era` command: a client of the API like any other. It imports nothing of the server but to start one."""
