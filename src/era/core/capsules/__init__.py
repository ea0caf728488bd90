"""Capsules: a session with everything that belongs to it as one archive, exported and imported (format.py)."""
