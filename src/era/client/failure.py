"""What ends a command of the client."""

from __future__ import annotations


class Failure(Exception):
    """A command can't do what was asked. The message is for the user; `era` prints it and leaves with exit code 2."""
