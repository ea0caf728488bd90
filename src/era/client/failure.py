"""What ends a command of the client, and how it is told."""

from __future__ import annotations

from typing import Any

from era.errors import EraError

_NEXT = {
    "unauthorized": "Set ERA_API_KEY, or remember the server's key with `era login URL`.",
    "connection_lost": "It may have been done: look before you try again. `era runs list SESSION` shows its runs.",
    "server_away": "Start one with `era serve`, or name another with --server, ERA_SERVER or `era login`.",
}
"""What to do about an error, where the command knows better than the API."""


class Failure(Exception):
    """A command can't do what was asked. The message is for the user; `era` prints it and leaves with exit code 2."""

    def __init__(self, message: str, code: str = "usage") -> None:
        super().__init__(message)
        self.code = code


def told(error: Failure | EraError, *, as_json: bool) -> str:
    """What is printed of an error: a line and what to do, or an object like the API's."""
    if isinstance(error, Failure):
        message, _, hint = str(error).partition("\n")
        fields: dict[str, Any] = {"error": message, "code": error.code, "hint": hint.strip()}
    else:
        fields = {"error": error.message, "code": error.code, "hint": _NEXT.get(error.code, error.hint)}
        if error.details is not None:
            fields["details"] = error.details
        if error.request_id:
            fields["request_id"] = error.request_id
    if as_json:
        from json import dumps

        return dumps(fields, ensure_ascii=False)
    return f"era: {fields['error']}\n     {fields['hint']}".rstrip()
