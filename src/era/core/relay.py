"""The relay: a request from outside as a run's environment, and what the run printed as the response.

Theory of operation
===================

Nothing here does anything: `environment` says what the stored code is to see of a request, `reply` what is to be sent
when its run has ended. Between the two lies an ordinary run.

The caller is anybody, and so is the code that answers. But its URL has the host and port of the API, of the server's
own pages, and for cookies even of every other service on that host. Three rules keep these apart:

- Of the request, the code gets nothing that authenticates against the API, and no cookie but its own. Its cookies have
  a prefix outside, which tells them from all others, and a path, which keeps them from other sessions.
- A document it answers is in a sandbox of the browser, with an origin of its own that equals no other: it reads no
  answer of this server, has no storage and no cookies, and its requests say `Origin: null`, which the gate refuses.
- It sets no header that speaks for the connection, for the whole origin, or to a proxy in between.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from era.core import jsontext
from era.core.models import Status
from era.core.runs import Collected
from era.errors import RelayFailed, RelayTimeout, TooLarge

MAX_BODY_BYTES = 128 << 10
"""A body over this fits no variable, whatever is in it."""

_MAX_VARIABLE_BYTES = 128 << 10
"""Linux's bound for one string of an environment: name, `=`, value and a NUL."""

_MAX_ANSWER_HEADER_BYTES = 32 << 10
_MAX_ANSWER_COMMAS = 500_000
"""What a program prints as JSON may be tens of MiB, and as small values take thirty times that in memory."""

POLICY = "sandbox allow-scripts allow-forms allow-popups allow-modals allow-downloads"
"""Never `allow-same-origin`, nor popups that escape."""

COOKIE_PREFIX = "era-session-"
_COOKIE_ATTRIBUTES = frozenset({"expires", "max-age", "secure", "httponly", "samesite", "partitioned"})

_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"}
    | {"transfer-encoding", "upgrade", "http2-settings"}
)
_NOT_FOR_GUESTS = _HOP_BY_HOP | {
    # what this server says itself
    *("content-length", "date", "x-request-id", "x-era-run", "x-content-type-options"),
    # what would hold for the whole origin
    *("service-worker-allowed", "clear-site-data", "strict-transport-security", "alt-svc", "accept-ch", "set-cookie2"),
    *("nel", "report-to", "reporting-endpoints", "set-login", "speculation-rules", "use-as-dictionary"),
    # what servers in front of this one would take as an order to send a file of theirs
    *("x-sendfile", "x-lighttpd-send-file", "x-lighttpd-send-tempfile"),
}
_NOT_FOR_GUESTS_PREFIX = "x-accel-"

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

_NO_ANSWER: dict[Status, str] = {
    "oom": "ran out of memory",
    "killed": "was killed",
    "disk_full": "ran out of disk space",
}


@dataclass(frozen=True, slots=True)
class Call:
    """A request from outside. `path` and `query` are as they came, without the `?`; `headers` have lower-case names."""

    method: str
    path: bytes
    query: bytes
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """What is sent back. The server adds what is its own to say."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


def environment(call: Call, *, keyed: bool) -> dict[str, str]:
    """The variables that tell a program of a request. `keyed` is whether the API wants a key, which a caller may have
    sent without need. Raises TooLarge for what fits no environment."""
    body, encoding = _body_text(call.body)
    variables = {
        "ERA_REQUEST_MODE": "proxy",
        "ERA_HTTP_METHOD": call.method,
        "ERA_HTTP_PATH": _ascii(call.path) or "/",
        "ERA_HTTP_QUERY": "?" + _ascii(call.query) if call.query else "",
        "ERA_HTTP_HEADERS": json.dumps(_request_headers(call.headers, keyed=keyed), ensure_ascii=False),
        "ERA_HTTP_BODY": body,
        "ERA_HTTP_BODY_ENCODING": encoding,
    }
    for name, value in variables.items():
        if len(name) + len(value.encode()) + 2 > _MAX_VARIABLE_BYTES:
            raise too_large(name)
    return variables


def too_large(variable: str) -> TooLarge:
    return TooLarge(
        f"The request is too large for the program that answers it: {variable} would be over 128 KiB.",
        hint="A body may have about 128 KiB as UTF-8 text and 96 KiB as anything else. Upload larger things as files.",
    )


def reply(run: Collected, cookie_path: str) -> Reply:
    """The response that a run has printed. Its cookies get the path `cookie_path`.

    Raises RelayTimeout or RelayFailed where there is none, or none that can be sent.
    """
    result = run.result
    if result.status == "timeout":
        raise RelayTimeout("The program that answers this URL reached its timeout.")
    if why := _NO_ANSWER.get(result.status):
        raise RelayFailed(f"The program that answers this URL {why}.")
    if result.stdout_truncated:
        raise RelayFailed("What the program printed is over its limit of output, so it is no whole answer.")
    printed = run.stdout.strip()
    if printed[:1] in (b"{", b"[") and printed.count(b",") > _MAX_ANSWER_COMMAS:
        raise RelayFailed("What the program printed is JSON of too many values.")
    try:
        value = jsontext.loads(printed)
    except jsontext.JsonProblem:
        status = 200 if result.exit_code == 0 else 500
        return Reply(status, _headers({}, "text/plain; charset=utf-8", cookie_path), run.stdout)
    if not isinstance(value, dict):
        return Reply(200, _headers({}, "application/json", cookie_path), printed)
    return _described(value, printed, cookie_path)


def _described(answer: dict[str, Any], printed: bytes, cookie_path: str) -> Reply:
    """The response that an object describes. What it leaves out is as for any other JSON."""
    status = answer.get("status")
    if not isinstance(status, int) or isinstance(status, bool):
        status = 200  # {"status": "ok"} is an answer, no description of one
    elif not 200 <= status <= 599:
        raise RelayFailed(f"The program answered 'status' {str(status)[:20]}, which is not one from 200 to 599.")
    headers, media_type = answer.get("headers", {}), answer.get("contentType")
    if not isinstance(headers, dict):
        raise RelayFailed("The program answered 'headers' that are no object.")
    if media_type is not None and not isinstance(media_type, str):
        raise RelayFailed("The program answered a 'contentType' that is no string.")
    if media_type is not None:
        headers = {**headers, "content-type": media_type}  # the last one counts
    body = answer.get("body")
    if "body" not in answer:
        content, default = printed, "application/json"
    elif isinstance(body, str):
        content, default = body.encode(), "text/plain; charset=utf-8"
    else:
        content, default = jsontext.compact(body).encode(), "application/json"
    if status in (204, 205, 304):
        content = b""
    return Reply(status, _headers(headers, default, cookie_path), content)


def _headers(given: dict[str, Any], default_type: str, cookie_path: str) -> list[tuple[str, str]]:
    """The headers of a response, of which those that are not a guest's to set are left out. Raises RelayFailed."""
    found: list[tuple[str, str]] = []
    policies: list[str] = []
    media_type = default_type
    for name, value in _pairs(given):
        if name in _NOT_FOR_GUESTS or name.startswith(_NOT_FOR_GUESTS_PREFIX):
            continue
        if name == "set-cookie":
            found.append((name, _set_cookie(value, cookie_path)))
        elif name == "content-security-policy":
            policies += _without_sandbox(value)
        elif name == "content-type":
            media_type = value
        else:
            found.append((name, value))
    if media_type.strip().lower().startswith("multipart/"):
        # Browsers have taken the headers of a part for those of a document.
        raise RelayFailed("The program answered a multipart type, which can't be relayed.")
    found.append(("content-type", media_type))
    if sum(len(name) + len(value) + 4 for name, value in found) > _MAX_ANSWER_HEADER_BYTES:
        raise RelayFailed("The program answered more than 32 KiB of headers.")
    # Ours comes last: by the letter of HTML, of several policies with a `sandbox` the last one counts.
    return [
        *found,
        *(("content-security-policy", policy) for policy in policies),
        ("content-security-policy", POLICY),
        ("x-content-type-options", "nosniff"),
    ]


def _pairs(given: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Names in lower case and values, one at a time. Raises RelayFailed for what no header can be."""
    for name, values in given.items():
        if not _TOKEN.fullmatch(name):
            raise RelayFailed("The program answered a header with a name that no header can have.")
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise RelayFailed(f"The program answered a header '{name[:40]}' that is neither text nor a number.")
            text = str(value).strip(" \t")
            if _CONTROL.search(text) or not text.isascii():
                raise RelayFailed(
                    f"The program answered a header '{name[:40]}' with a character that can't be in one.",
                    hint="A header is one line of ASCII: no line breaks, no NUL.",
                )
            yield name.lower(), text


def _without_sandbox(policy: str) -> list[str]:
    """The policies of a Content-Security-Policy header, without what they say of a sandbox."""
    policies = []
    for one in policy.split(","):
        directives = [part.strip() for part in one.split(";")]
        kept = [part for part in directives if part and part.split()[0].lower() != "sandbox"]
        if kept:
            policies.append("; ".join(kept))
    return policies


def _set_cookie(value: str, path: str) -> str:
    """A cookie as it may be set: with our prefix, for the session's URLs only. Raises RelayFailed."""
    pair, *attributes = value.split(";")
    name, separator, content = pair.partition("=")
    if not separator or not _TOKEN.fullmatch(name.strip()):
        raise RelayFailed("The program answered a cookie that is none.")
    kept = [part.strip() for part in attributes if part.partition("=")[0].strip().lower() in _COOKIE_ATTRIBUTES]
    return "; ".join([f"{COOKIE_PREFIX}{name.strip()}={content.strip()}", *kept, f"Path={path}"])


def _request_headers(headers: Iterable[tuple[bytes, bytes]], *, keyed: bool) -> dict[str, str]:
    """What of the request's headers the program sees.

    Headers that `Connection` names are left in: they end here anyway, and a caller could use that to take away what a
    proxy in front has added.
    """
    # Set-Cookie is no request header, and the only one whose values can't be joined.
    dropped = _HOP_BY_HOP | {"set-cookie"} | ({"authorization"} if keyed else set())
    found: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        if name in dropped:
            continue
        if name == "cookie":
            value = _own_cookies(value)
            if not value:
                continue
        found[name] = f"{found[name]}{'; ' if name == 'cookie' else ', '}{value}" if name in found else value
    return found


def _own_cookies(value: str) -> str:
    """Of a Cookie header, the cookies that the session has set, under the names it gave them."""
    pairs = [pair.strip() for pair in value.split(";")]
    return "; ".join(pair.removeprefix(COOKIE_PREFIX) for pair in pairs if pair.startswith(COOKIE_PREFIX))


def _body_text(body: bytes) -> tuple[str, str]:
    """A body as a variable can hold it, and how."""
    if b"\0" not in body:
        try:
            return body.decode(), "utf-8"
        except UnicodeDecodeError:
            pass
    return base64.b64encode(body).decode(), "base64"


def _ascii(target: bytes) -> str:
    """A part of the request's target as it came. What can't stand in one is escaped, should it have come at all."""
    return "".join(chr(byte) if 0x20 < byte < 0x7F else f"%{byte:02X}" for byte in target)
