"""Sandboxes: ready ones, warm ones, admission of runs, cached directories."""
