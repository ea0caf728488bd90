"""The HTTP server: checks before the start, listening, signals, stop; `era doctor`."""
