"""Answers in JSON, the body and headers of an error, and the bounds that all routes share."""

from __future__ import annotations

import json
from typing import Any

from fastapi import Response

from era.errors import EraError, RangeNotSatisfiable, TooSlow, Unauthorized

MAX_BODY_BYTES = 16 << 20
HUNG_UP = 499
"""The status in the log of a request whose caller hung up before there was an answer: nginx's, as none is defined."""


class Answer(Response):
    """A JSON response from plain values, not validated again."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json_bytes(content)


def json_bytes(content: Any) -> bytes:
    """Plain values as the JSON that answers have."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def error_body(error: EraError, request_id: str) -> dict[str, Any]:
    """The body of an error, in the contract's shape."""
    body = {"error": error.message, "code": error.code, "hint": error.hint, "request_id": request_id}
    if error.details is not None:
        body["details"] = error.details
    return body


def error_headers(error: EraError) -> dict[str, str]:
    """The headers that belong to an error, such as Retry-After."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, RangeNotSatisfiable):
        headers["Content-Range"] = f"bytes */{error.size}"
    if isinstance(error, TooSlow):
        headers["Connection"] = "close"  # the rest of this request must not be read as the next one
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return headers
