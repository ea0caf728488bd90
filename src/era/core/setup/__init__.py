"""Setups: what a session has installed before it runs anything. Requests for packages, builds, commands, locks."""
