"""Tasks, threads, the meter and the limiter, turns, shares, streams, event logs."""
