"""Sites: a host name of its own for each session and port, `{port}-{label}.localhost`, and so an origin of its own.

Theory of operation. A label is the key of a session's row, sealed: it is encrypted, and has a tag that nobody can make
who doesn't have the server's key. So nothing is stored, two sessions never share a label, nobody can guess one, and a
session that takes over the id of a deleted one has another origin: it finds nothing of what a browser kept for the one
before. The construction is SIV: the tag is a keyed hash of what is sealed, and what it is encrypted with depends on the
tag.

Whatever looks like the name of a site is one, whether or not there is a session behind it: no route of this server's
own may be reachable under such a name.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from dataclasses import dataclass

from era.core.metadata import MetadataStore
from era.core.models import Session
from era.errors import BadRequest, NotFound

LOOPBACK = "localhost"
"""Browsers take every name below it for this machine (RFC 6761)."""

_TAG_BYTES, _KEY_BYTES = 12, 8
_LABEL = re.compile("[a-z2-7]{32}")


@dataclass(frozen=True, slots=True)
class SiteName:
    """The host name of a site, as it was asked for."""

    port: int
    label: str
    is_public: bool
    """Whether it is below the server's public host, and not below `localhost`."""


class Sites:
    """Makes names of sites, and finds the sessions behind them."""

    def __init__(self, key: bytes, store: MetadataStore, public_host: str | None) -> None:
        """`key` is 32 secret bytes. `public_host` is the name (and port) below which sites are for others."""
        self._tag_key, self._pad_key = (hmac.digest(key, name, hashlib.sha256) for name in (b"tag", b"pad"))
        self._store = store
        self._public_host = public_host
        above = [LOOPBACK, *([public_host.partition(":")[0]] if public_host else [])]
        names = "|".join(re.escape(name) for name in above)
        self._name = re.compile(rf"([0-9]{{1,5}})-([a-z0-9-]+)\.({names})\.?(:[0-9]*)?")

    def name(self, host: str) -> SiteName | None:
        """Return the site that a Host header names, None for the name of anything else. A dot at the end of a name
        marks it as complete: it is the same name."""
        match = self._name.fullmatch(host.lower())
        return match and SiteName(int(match[1]), match[2], match[3] != LOOPBACK)

    def label(self, session: Session) -> str:
        """The session's label: 32 letters and digits, a DNS label with any port before it."""
        key = session.key.to_bytes(_KEY_BYTES)
        tag = self._tag(key)
        return base64.b32encode(tag + self._sealed(tag, key)).decode().lower()

    def url(self, session: Session, port: int, served_port: int) -> str:
        """The URL of a session's site: below the public host, where a TLS proxy is in front of this server, or else
        below `localhost`, where this server listens on `served_port`."""
        name = f"{port}-{self.label(session)}"
        if self._public_host is not None:
            return f"https://{name}.{self._public_host}"
        return f"http://{name}.{LOOPBACK}:{served_port}"

    async def session(self, name: SiteName) -> Session:
        """The session of a site. Raises NotFound, Expired, or BadRequest for what can't be a port."""
        if not 1 <= name.port <= 65535:
            raise BadRequest("The name has no port of 1 to 65535 in front.", hint="{port}-{label}.localhost")
        key = self.session_key(name)
        try:
            if key is not None:
                return await self._store.session_of_site(key)
        except NotFound:
            pass
        raise NotFound("There is no session at this name.", hint="GET /api/sessions/{id}/host tells a session's name.")

    def session_key(self, name: SiteName) -> int | None:
        """The key of a site's session; None where the label isn't ours."""
        label = name.label
        if not _LABEL.fullmatch(label):
            return None
        sealed = base64.b32decode(label.upper())
        tag, content = sealed[:_TAG_BYTES], sealed[_TAG_BYTES:]
        key = self._sealed(tag, content)
        return int.from_bytes(key) if hmac.compare_digest(tag, self._tag(key)) else None

    def _tag(self, key: bytes) -> bytes:
        return hmac.digest(self._tag_key, key, hashlib.sha256)[:_TAG_BYTES]

    def _sealed(self, tag: bytes, content: bytes) -> bytes:
        """The content encrypted, or decrypted: the same operation."""
        pad = hmac.digest(self._pad_key, tag, hashlib.sha256)
        return bytes(one ^ other for one, other in zip(content, pad, strict=False))
