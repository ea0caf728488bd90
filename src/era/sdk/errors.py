"""What a client raises: the errors that the server answers, and those of getting an answer at all.

EraError                    everything that this client raises on purpose
├── BadRequest … Unavailable    answered by the server: era/errors.py draws them
├── ServerAway              no server accepts the connection: nothing was sent
├── ConnectionLost          the connection broke before the answer was complete
├── AnswerTimeout           no answer in the time that it was given
├── NotEra                  something answers that is no ERA server
├── LocalError              a local file or directory can't be read or written
└── RunFailed               raised by `RunResult.check()` (in answers.py): the program did not end with 0
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from era.errors import EraError


class ServerAway(EraError):
    """No server accepts connections at the address. Nothing of the call was sent, so nothing was done."""

    status = 0
    code = "server_away"
    hint = "Start a server with `era serve`, or say where it is: Era(url), or ERA_SERVER."


class ConnectionLost(EraError):
    """The connection ended before the answer did, and no later attempt was answered. The call may have been done."""

    status = 0
    code = "connection_lost"
    hint = (
        "What was asked for may have been done: look before you ask again. session.runs.list() shows runs that began."
    )


class AnswerTimeout(EraError):
    """No answer came in time. What was asked for may still be done."""

    status = 0
    code = "answer_late"
    hint = "It may still be going on: session.runs.list() has its runs. Era(timeout=…) allows more."


class NotEra(EraError):
    """What answers at this address doesn't speak as ERA does."""

    code = "not_era"
    hint = "Check the address, and whether a proxy stands between."


class LocalError(EraError):
    """Something on this machine can't be read or written."""

    status = 0
    code = "local_file"
    hint = ""


def answered_error(status: int, headers: Mapping[str, str], body: object) -> EraError:
    """The error that an answer of the server is, in the class of its code, or else of its status."""
    if not isinstance(body, dict) or not isinstance(body.get("error"), str):
        to = re.split("[?#]", headers.get("location", ""))[0]  # a query may be a secret
        how = f"redirects to {to}" if to else f"is a {status}"
        error: EraError = NotEra(f"The answer {how}, and not as ERA answers.")
        error.status = status
        return error
    text: dict[str, Any] = body
    kind = _kind(status, str(text.get("code")))
    error = kind.__new__(kind)
    EraError.__init__(error, text["error"], hint=text.get("hint"), code=text.get("code"), details=text.get("details"))
    error.args = (f"{error.message} {error.hint}".strip(),)
    error.status = status
    error.request_id = str(text.get("request_id") or headers.get("x-request-id", ""))
    after = headers.get("retry-after", "")
    error.retry_after = int(after) if after.isdigit() else None
    return error


def streamed_error(event: Mapping[str, Any]) -> EraError:
    """The error that an event of a stream tells, in the class of its code. It has no status of its own: that of the
    class, or 503."""
    code = str(event.get("code"))
    known: list[type[EraError]] = [EraError, *_below(EraError)]
    return answered_error(next((each.status for each in known if each.code == code), 503), {}, event)


def _kind(status: int, code: str) -> type[EraError]:
    classes = list(_below(EraError))
    # Several classes may share a code, of which the first is the family; and one of another status is none of them.
    for each in classes:
        if each.code == code and each.status == status:
            return each
    if status == EraError.status:
        return EraError  # a bug of the server, or something newer than this client
    return next((each for each in classes if each.status == status and each.__module__ == "era.errors"), EraError)


def _below(kind: type[EraError]) -> Iterator[type[EraError]]:
    """The classes below one, nearest first."""
    level = kind.__subclasses__()
    while level:
        yield from level
        level = [below for each in level for below in each.__subclasses__()]
