"""Benchmarks: what a run costs, beside starting the same interpreter without ERA. See bench/README.md."""
