"""ERA runs untrusted code in sessions that remember."""

__version__ = "0.1.0"
