"""Hosts of a cluster as processes, and Ray as the engine that has one on each of its nodes."""
