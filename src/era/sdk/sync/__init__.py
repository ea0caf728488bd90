# Made by scripts/blocking.py of src/era/sdk/aio/__init__.py: change that one.
"""The SDK that blocks."""
