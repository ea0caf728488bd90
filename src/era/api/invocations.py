"""How a program is called, as bodies say it: checked, and as the core takes it."""

from __future__ import annotations

from collections.abc import Sequence

from era.core.files.paths import parse
from era.core.models import command_of
from era.core.program import Invocation
from era.errors import BadRequest, TooLarge
from era.wire.runs import ExecuteBody, InvokedBody

_MAX_WORD_BYTES = (128 << 10) - 1  # Linux: MAX_ARG_STRLEN, with its final NUL
_MAX_WORDS_BYTES = 1 << 20


def invocation_of(body: InvokedBody, code: str | None) -> Invocation:
    """How the program is called. Raises BadRequest or TooLarge for what no program can be called with."""
    command: Sequence[str] = ()
    if body.command is not None:
        if code is not None:
            raise BadRequest("'code' and 'command' can't both be run.", hint="Leave one of them out.")
        if body.args:
            raise BadRequest("'args' are for code.", hint="A command has its arguments in 'command'.")
        command = command_words(body.command)
    _check_words("args", body.args)
    return Invocation(body.args, _encoded("stdin", body.stdin), directory(body.cwd), command)


def let_go(body: InvokedBody) -> None:
    """The run has what the body of its request says: drop what may be long in it, since the run may wait for long. As
    text it takes up to four bytes a character."""
    body.stdin = ""
    if isinstance(body, ExecuteBody):
        body.files = {}


def command_words(command: str | list[str]) -> list[str]:
    """A command as an argument vector. Raises BadRequest or TooLarge for what no program can be called with."""
    named = command if isinstance(command, str) else "".join(command[:1])
    if not named.strip():
        raise BadRequest("'command' names no program.")
    words = command_of(command)
    _check_words("command", words)
    return words


def directory(cwd: str) -> str:
    """A directory below the working directory; empty for that itself. Raises BadRequest."""
    _encoded("cwd", cwd)
    name = "/".join(part for part in cwd.removesuffix("/").split("/") if part != ".")
    if name or cwd.startswith("/"):
        parse(name)
    return name


def _check_words(field: str, words: Sequence[str]) -> None:
    """Raises BadRequest or TooLarge for words that can't be arguments of a program (execve(2))."""
    total = 0
    for word in words:
        size = len(_encoded(field, word))
        if "\0" in word:
            raise BadRequest(f"'{field}' has a NUL character.")
        total += size
        if size > _MAX_WORD_BYTES or total > _MAX_WORDS_BYTES:
            raise TooLarge(
                f"'{field}' is too large: 128 KiB a word and 1 MiB in all are allowed.", hint="Send it as 'stdin'."
            )


def _encoded(field: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"'{field}' has a lone surrogate (half of a character).") from None
