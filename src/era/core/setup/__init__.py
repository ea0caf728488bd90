"""What a session has installed before it runs anything: wishes, builds, commands, locks."""
