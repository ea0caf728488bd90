"""RunConnections out of sandboxes, and what may pass."""
