"""Benchmarks: what a run costs, side by side with starting the same interpreter without ERA. See docs/benchmarks.md."""
