"""What goes on beside a session's runs: processes, terminals, contexts, its files as they are, checkpoints."""
