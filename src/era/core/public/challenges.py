"""Challenges (WWW-Authenticate) of sessions: none may get a browser to send what was meant for another session.

Theory of operation
===================

All sessions share an origin, and credentials of HTTP belong to an origin. A browser that has asked somebody for a name
and password keeps them under the origin and the realm (RFC 7617). It sends them

- to every path below the directory in which it was asked: no harm, as long as that is a session's own (headers.place);
- and to any path of the origin that asks for the same realm, without asking anybody again. So the realm is ours: the
  session's place, whatever its program says. Nobody else's answer can have it.

Digest, Negotiate and NTLM are removed. A server that verifies a digest must know its realm, and can name other paths
(`domain`). The other two know no realm, and browsers answer them with what somebody has logged in with. A browser sends
such credentials here only if something else on this host has asked for them, so they are removed from requests, too.

What is no challenge of a kind that we know is removed: another reader could take it for one.
"""

from __future__ import annotations

import re

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


def allowed(value: str, realm: str | None) -> list[str]:
    """The challenges of a WWW-Authenticate header that may be sent, each a header of its own. `Basic` gets this realm;
    without one it isn't sent."""
    found: list[str] = []
    for scheme, challenge in _challenges(value):
        if scheme == _BY_REALM:
            found += [f'Basic realm="{realm}", charset="UTF-8"'] if realm is not None else []
        elif scheme in _FOR_PROGRAMS:
            found.append(challenge)
    return list(dict.fromkeys(found))


def of_site(value: str) -> list[str]:
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


def is_of_another(authorization: str) -> bool:
    """Whether an Authorization header is of a scheme that no session can have asked for."""
    return authorization.strip().partition(" ")[0].lower() in _OF_OTHERS
