"""Redaction of tools' output: names, passwords and tokens in URLs, which are the operator's, are replaced.

Tools hide at most what follows a colon, and many registries take a token as the name alone. So all before the `@` goes.
"""

from __future__ import annotations

import re

_SECRET = re.compile(rb"://[^/\s]*@")
_REDACTED = "://…".encode()
_OPEN = re.compile(rb"(?:://[^/\s]*|:/?)\Z")
"""At the end of a piece: what may go on as a URL's name or password. Both patterns take linear time, since no two of
their matches can begin before the same `/`."""

_MOST_HELD = 16 << 10


class Redaction:
    """Redacts a stream that comes in pieces, wherever these end."""

    def __init__(self) -> None:
        self._held = b""
        """The end of what came, which can't be shown before more has come."""

    def shown(self, piece: bytes) -> bytes:
        """What of the stream can be shown after this piece has come, too."""
        text = self._held + piece
        end = found.start() if (found := _OPEN.search(text)) else len(text)
        self._held = text[end:]
        shown = _SECRET.sub(_REDACTED + b"@", text[:end])
        return shown + self.rest() if len(self._held) > _MOST_HELD else shown

    def rest(self) -> bytes:
        """The rest of the stream, which has ended. It may have ended within a password, so that isn't shown either."""
        held, self._held = self._held, b""
        return _REDACTED if held.startswith(b"://") else held
