"""Filters for the headers that pass between the outside and a session, whether stored code answers or a live server.

Theory of operation
===================

The caller may be anybody, and so may the code that answers. But a public URL has the host and port of the API and of
the server's own pages, and for cookies even of every other service on that host. Four rules keep these apart:

- Of the request, the code gets nothing that authenticates against the API (an Authorization, X-Api-Key or cookie with
  one of its keys), and no cookies but its own. Outside, its cookies have a prefix, which tells them from others, and
  a path, which keeps them from other sessions.
- A document that it answers is sandboxed by a Content-Security-Policy, with an opaque origin that equals no other: it
  can't read answers of this server, has no storage and no cookies, and its requests say `Origin: null`, which the guard
  refuses.
- A browser sends the credentials that somebody has typed in to the directory in which it was asked for them, and to
  whoever on this host asks for the same realm (RFC 7617). So a session's `Basic` gets the session's own place as realm.
  Digest, Negotiate and NTLM are removed from answers and requests: a digest can name other paths (`domain`), and the
  other two know no realm. A challenge of a kind that we don't know is removed, too.
- It can't set headers that are about the connection, about the whole origin, or meant for a proxy in between.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from era.core.owners.api_keys import contains_api_key
from era.errors import RelayFailed

_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = rf'{_NAME}[ \t]*=[ \t]*(?:{_NAME}|"(?:[^"\\\x00-\x1f\x7f]|\\[ -~])*")'
_PARAMETERS = rf"{_PARAMETER}(?:[ \t]*,[ \t]*{_PARAMETER})*"
_BASE64 = r"[A-Za-z0-9._~+/-]+=*(?=[ \t]*(?:,|$))"
_CHALLENGE = re.compile(rf"(?P<scheme>{_NAME})(?:[ ]+(?P<rest>{_PARAMETERS}|{_BASE64}))?[ \t]*(?:,[ \t,]*|$)")

_FOR_PROGRAMS = frozenset({"bearer", "dpop"})
"""Schemes that browsers don't answer by themselves."""

_BY_REALM = "basic"
_OF_THE_MACHINE = frozenset({"negotiate", "ntlm", "kerberos"})
"""Browsers answer these with what somebody has logged in with, wherever they are asked."""

_OF_OTHERS = frozenset({"digest", "negotiate", "ntlm", "kerberos"})


def _challenges_allowed(value: str, realm: str | None) -> list[str]:
    """The challenges of a WWW-Authenticate header that may be sent, each a header of its own. `Basic` gets this realm;
    without one it isn't sent."""
    found: list[str] = []
    for scheme, challenge in _challenges(value):
        if scheme == _BY_REALM:
            found += [f'Basic realm="{realm}", charset="UTF-8"'] if realm is not None else []
        elif scheme in _FOR_PROGRAMS:
            found.append(challenge)
    return list(dict.fromkeys(found))


def _challenges_of_site(value: str) -> list[str]:
    """The challenges of a WWW-Authenticate header of a session with an origin of its own: all that can be answered with
    what belongs to that origin."""
    return [challenge for scheme, challenge in _challenges(value) if scheme not in _OF_THE_MACHINE]


def _challenges(value: str) -> list[tuple[str, str]]:
    """The challenges of a header, each with its scheme in lower case. None where any can't be read."""
    found, at = [], 0
    value = value.strip(" \t,")
    while at < len(value):
        match = _CHALLENGE.match(value, at)
        if match is None:
            return []
        at = match.end()
        challenge = f"{match['scheme']} {match['rest']}" if match["rest"] else match["scheme"]
        found.append((match["scheme"].lower(), challenge))
    return found


def _is_of_another(authorization: str) -> bool:
    """Whether an Authorization header is of a scheme that no session can have asked for."""
    return authorization.strip().partition(" ")[0].lower() in _OF_OTHERS


POLICY = "sandbox allow-scripts allow-forms allow-popups allow-modals allow-downloads"
"""The policy of every document. It must never have `allow-same-origin` or `allow-popups-to-escape-sandbox`."""

COOKIE_PREFIX = "era-session-"
_COOKIE_ATTRIBUTES = frozenset({"expires", "max-age", "secure", "httponly", "samesite", "partitioned"})

_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"}
    | {"transfer-encoding", "upgrade", "http2-settings"}
)
_NOT_FOR_GUESTS = _HOP_BY_HOP | {
    # set by this server
    *("content-length", "date", "x-request-id", "x-era-run", "x-era-host", "x-content-type-options"),
    # in force for the whole origin
    *("service-worker-allowed", "clear-site-data", "strict-transport-security", "alt-svc", "accept-ch", "set-cookie2"),
    *("nel", "report-to", "reporting-endpoints", "set-login", "speculation-rules", "use-as-dictionary"),
    # commands to a web server in front of this one to send a file of its own
    *("x-lighttpd-send-file", "x-lighttpd-send-tempfile"),
}
_FOR_OWN_ORIGIN = frozenset(
    {"service-worker-allowed", "accept-ch", "reporting-endpoints", "speculation-rules", "use-as-dictionary"}
    | {"x-content-type-options"}
)
"""Of these, the ones that concern one origin only. Clear-Site-Data isn't among them: it removes the cookies of all
hosts below the same registered name."""

_NOT_FOR_GUESTS_PREFIXES = ("x-accel-", "x-sendfile", "x-litespeed-", "x-reproxy-")
"""Families of such commands: nginx's, of Apache and lighttpd, LiteSpeed's, and Perlbal's, which may name any URL."""


TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

_MAX_ANSWER_BYTES = 32 << 10

type Headers = list[tuple[str, str]]
"""With names in lower case."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where on this host a session answers."""

    cookie_path: str
    """The `Path` of its cookies."""

    realm: str | None
    """Of its challenges; None where it may not ask for credentials."""

    own_origin: bool = False
    """Whether it has a host name of its own (sites.py), so that nothing of it can be taken for another's."""


def place(above: str, session_id: str, raw_path: bytes) -> Place:
    """The place of a session, for an answer at this path. `above` is the path of a proxy in front of us.

    A browser sends credentials, unasked, to everything below the directory in which it was asked for them. So a session
    may not ask at `/proxy/{id}`, which is in the directory of all sessions.
    """
    path = f"{above}/proxy/{session_id}/"
    return Place(path, path if raw_path.startswith(f"/proxy/{session_id}/".encode()) else None)


def site(label: str) -> Place:
    """The place of a session that answers under a name of its own."""
    return Place(f"site {label}", None, own_origin=True)


def of_request(
    headers: Iterable[tuple[bytes, bytes]], key: bytes | None, *, own_origin: bool = False
) -> list[tuple[str, str]]:
    """The headers of a request that a session may see, with names in lower case.

    `key` is the operator's API key. An Authorization or X-Api-Key header with it, or with any other key of the API, is
    dropped, and so is such a cookie: the caller may have sent it needlessly. So is an Authorization that no session can
    have asked for. Headers that `Connection` names are kept: they would end here anyway, and a caller could use this to
    remove what a proxy in front has added. All cookies and credentials of a session's `own_origin` are its own.
    """
    passed: list[tuple[str, str]] = []
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        if name in _HOP_BY_HOP or name == "set-cookie":  # Set-Cookie is no request header, and can't be joined
            continue
        if name in ("authorization", "x-api-key") and _has_api_key(raw_value, key):
            continue
        if name == "authorization" and not own_origin and _is_of_another(value):
            continue
        if name == "cookie":
            pairs = [pair.strip() for pair in value.split(";")] if own_origin else _own_cookies(value)
            value = "; ".join(pair for pair in pairs if pair and not _has_api_key(pair.encode("latin-1"), key))
            if not value:
                continue
        passed.append((name, value))
    return passed


def of_answer(received: Iterable[tuple[str, str]], place: Place) -> list[tuple[str, str]]:
    """The headers of an answer that may be sent to the caller, and those that this server adds.

    `received` has names in lower case. Raises RelayFailed for what can't be sent.
    """
    relayed = [(name, value.strip(" \t")) for name, value in received if _is_relayed(name, place)]
    _check_size(relayed)  # before anything is looked for in them, which takes time
    passed: Headers = []
    policies: Headers = []
    media_type: str | None = None
    for name, value in relayed:
        if _CONTROL.search(value):
            raise RelayFailed(
                f"The program answered a header '{name[:40]}' with a character that can't be in one.",
                hint="A header is one line of ASCII: no line breaks, no NUL.",
            )
        if name == "content-type":
            media_type = value  # the last one counts
        elif place.own_origin:
            passed += _of_site(name, value)
        elif name == "set-cookie":
            passed.append((name, _set_cookie(value, place.cookie_path)))
        elif name == "www-authenticate":
            passed += [(name, challenge) for challenge in _challenges_allowed(value, place.realm)]
        elif name == "content-security-policy":
            policies += [(name, policy) for policy in _without_sandbox(value)]
        else:
            passed.append((name, value))
    if media_type is not None:
        if not place.own_origin and media_type.strip().lower().startswith("multipart/"):
            # Browsers have applied the headers of a part to a document, instead of those of the answer.
            raise RelayFailed("The program answered a multipart type, which can't be relayed.")
        passed.append(("content-type", media_type))
    _check_size([*passed, *policies])  # one header may have become a thousand lines
    if place.own_origin:
        return passed
    # Ours comes last: by the HTML standard, of several policies with a `sandbox` directive the last one counts.
    return [*passed, *policies, ("content-security-policy", POLICY), ("x-content-type-options", "nosniff")]


def _is_relayed(name: str, place: Place) -> bool:
    """Whether a header of an answer, with this name in lower case, is the program's to send."""
    if name.startswith(_NOT_FOR_GUESTS_PREFIXES):
        return False
    return name not in _NOT_FOR_GUESTS or (place.own_origin and name in _FOR_OWN_ORIGIN)


def _check_size(lines: Headers) -> None:
    """Raises RelayFailed for more than an answer may have: bytes as HTTP/1.1 writes them, which bounds their number,
    too."""
    if sum(len(name) + len(value) + 4 for name, value in lines) > _MAX_ANSWER_BYTES:
        raise RelayFailed("The program answered more than 32 KiB of headers.")


def _of_site(name: str, value: str) -> list[tuple[str, str]]:
    """A header of an answer from an origin of the session's own. Cookies are for this host only: with `Domain` they
    would be sent to other sessions, and to this server's own pages."""
    if name == "set-cookie":
        pair, *attributes = value.split(";")
        kept = [part for part in attributes if part.partition("=")[0].strip().lower() != "domain"]
        return [(name, ";".join([pair, *kept]))]
    if name == "www-authenticate":
        return [(name, challenge) for challenge in _challenges_of_site(value)]
    return [(name, value)]


def _without_sandbox(policy: str) -> list[str]:
    """The policies of a Content-Security-Policy header, without their `sandbox` directives."""
    policies = []
    for single in policy.split(","):
        directives = [part.strip() for part in single.split(";")]
        kept = [part for part in directives if part and part.split()[0].lower() != "sandbox"]
        if kept:
            policies.append("; ".join(kept))
    return policies


def _set_cookie(value: str, path: str) -> str:
    """A Set-Cookie value with our prefix, limited to the session's URLs. Raises RelayFailed for an invalid one."""
    pair, *attributes = value.split(";")
    name, separator, content = pair.partition("=")
    if not separator or not TOKEN.fullmatch(name.strip()):
        raise RelayFailed("The program answered a cookie that is none.")
    kept = [part.strip() for part in attributes if part.partition("=")[0].strip().lower() in _COOKIE_ATTRIBUTES]
    return "; ".join([f"{COOKIE_PREFIX}{name.strip()}={content.strip()}", *kept, f"Path={path}"])


def _own_cookies(value: str) -> list[str]:
    """Return the cookies of a Cookie header that the session has set, with their own names again."""
    pairs = [pair.strip() for pair in value.split(";")]
    return [pair.removeprefix(COOKIE_PREFIX) for pair in pairs if pair.startswith(COOKIE_PREFIX)]


def _has_api_key(value: bytes, key: bytes | None) -> bool:
    """Return whether a header's value or a cookie holds a key of the API: plain, in base64 (as Basic does), or escaped
    as in a URL (as cookies often are)."""
    texts = [value, unquote_to_bytes(value)]
    with suppress(binascii.Error):
        texts.append(base64.b64decode(value.partition(b" ")[2].strip(), validate=True))
    return any(contains_api_key(text) or (key is not None and key in text) for text in texts)
