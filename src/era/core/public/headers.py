"""Which headers pass between the outside and a session, either way, whoever answers: stored code or a live server.

Theory of operation
===================

The caller is anybody, and so is the code that answers. But its URL has the host and port of the API, of the server's
own pages, and for cookies even of every other service on that host. Three rules keep these apart:

- Of the request, the code gets nothing that authenticates against the API, and no cookie but its own. Its cookies have
  a prefix outside, which tells them from all others, and a path, which keeps them from other sessions.
- A document it answers is in a sandbox of the browser, with an origin of its own that equals no other: it reads no
  answer of this server, has no storage and no cookies, and its requests say `Origin: null`, which the guard refuses.
- It sets no header that speaks for the connection, for the whole origin, or to a proxy in between.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from contextlib import suppress

from era.core.api_keys import gives_away
from era.errors import RelayFailed

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

TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

_MAX_ANSWER_BYTES = 32 << 10


def of_request(headers: Iterable[tuple[bytes, bytes]], key: bytes | None) -> list[tuple[str, str]]:
    """What of a request's headers a session sees, with names in lower case. `key` is the operator's; a caller may have
    sent that or another key of the API's without need.

    Headers that `Connection` names are left in: they end here anyway, and a caller could use that to take away what a
    proxy in front has added.
    """
    found: list[tuple[str, str]] = []
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        if name in _HOP_BY_HOP or name == "set-cookie":  # which is no request header, and can't be joined
            continue
        if name == "authorization" and _holds(raw_value, key):
            continue
        if name == "cookie":
            value = _own_cookies(value)
            if not value:
                continue
        found.append((name, value))
    return found


def of_answer(given: Iterable[tuple[str, str]], cookie_path: str) -> list[tuple[str, str]]:
    """The headers of a response, of which those that are not a guest's to set are left out. Names are in lower case;
    cookies get the path `cookie_path`. Raises RelayFailed for what can't be sent."""
    found: list[tuple[str, str]] = []
    policies: list[str] = []
    media_type: str | None = None
    for name, value in given:
        if _CONTROL.search(value):
            raise RelayFailed(
                f"The program answered a header '{name[:40]}' with a character that can't be in one.",
                hint="A header is one line of ASCII: no line breaks, no NUL.",
            )
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
    if media_type is not None:
        if media_type.strip().lower().startswith("multipart/"):
            # Browsers have taken the headers of a part for those of a document.
            raise RelayFailed("The program answered a multipart type, which can't be relayed.")
        found.append(("content-type", media_type))
    if sum(len(name) + len(value) + 4 for name, value in found) > _MAX_ANSWER_BYTES:
        raise RelayFailed("The program answered more than 32 KiB of headers.")
    # Ours comes last: by the letter of HTML, of several policies with a `sandbox` the last one counts.
    return [
        *found,
        *(("content-security-policy", policy) for policy in policies),
        ("content-security-policy", POLICY),
        ("x-content-type-options", "nosniff"),
    ]


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
    if not separator or not TOKEN.fullmatch(name.strip()):
        raise RelayFailed("The program answered a cookie that is none.")
    kept = [part.strip() for part in attributes if part.partition("=")[0].strip().lower() in _COOKIE_ATTRIBUTES]
    return "; ".join([f"{COOKIE_PREFIX}{name.strip()}={content.strip()}", *kept, f"Path={path}"])


def _own_cookies(value: str) -> str:
    """Of a Cookie header, the cookies that the session has set, under the names it gave them."""
    pairs = [pair.strip() for pair in value.split(";")]
    return "; ".join(pair.removeprefix(COOKIE_PREFIX) for pair in pairs if pair.startswith(COOKIE_PREFIX))


def _holds(authorization: bytes, key: bytes | None) -> bool:
    """Whether a header gives a key away, as it is or in a password."""
    told = [authorization]
    with suppress(binascii.Error):
        told.append(base64.b64decode(authorization.partition(b" ")[2].strip(), validate=True))
    return any(gives_away(text) or (key is not None and key in text) for text in told)
