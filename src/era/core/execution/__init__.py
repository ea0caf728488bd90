"""One program from its start to its end: its environment, its output, its record."""
