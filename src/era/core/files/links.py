"""Links: URLs that read or write one file of a session without an API key, for a while.

Theory of operation. A link is a token that says all about itself, and an HMAC over it; nothing is stored. So there is
no bound to how many there are, and a link can't be listed or taken back by itself. It is dead when its time is up, when
its session is gone (a restored one is the same session), and when the API key that it was made with is: the digest of
that key is part of the HMAC, but not of the token, from which nobody can guess at a key.

The key of the HMAC is a file of the data directory. Without it every link is dead.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from era.core.metadata import MetadataStore
from era.core.models import Session, now
from era.core.owners.api_keys import ApiKeys, Caller
from era.core.trees.durable import sync
from era.core.trees.paths import Parts
from era.errors import LinkExpired, NotFound

MAX_SECONDS = 7 * 86_400
"""For how long a link may work."""

_KEY_BYTES = 32
_MAC_BYTES = 16
_MAX_TOKEN = 4096

type Method = Literal["GET", "PUT"]


@dataclass(frozen=True, slots=True)
class Link:
    """What a link allows."""

    session_id: str
    session_key: int
    """The link is to this very session, not to another one that has its id later."""

    path: Parts
    method: Method
    expires_at: int
    """UTC microseconds since 1970."""

    max_bytes: int | None = None
    """The size of the largest file that may be put; None for what the session may hold."""


class Links:
    """Makes links, and finds what they lead to."""

    def __init__(self, key: bytes, store: MetadataStore, api_keys: ApiKeys) -> None:
        """`key` is that of `signing_key`."""
        self._key = key
        self._store = store
        self._api_keys = api_keys

    async def make(
        self,
        session: Session,
        path: Parts,
        method: Method,
        seconds: float,
        caller: Caller,
        max_bytes: int | None = None,
    ) -> tuple[str, Link]:
        """The token of a new link, and what it allows, for so many seconds."""
        link = Link(session.id, session.key, path, method, now() + int(seconds * 1e6), max_bytes)
        content = json.dumps(
            [link.session_id, link.session_key, "/".join(path), method, link.expires_at, max_bytes, caller.key_id],
            separators=(",", ":"),
        ).encode()
        digest = caller.digest or self._api_keys.digest_of(caller.key_id)
        if digest is None or digest not in self._api_keys.digests_of(caller.key_id):
            raise NotFound("The API key of this call was revoked.")
        return _encode(self._mac(content, digest) + content), link

    async def find(self, token: str, method: str) -> tuple[Link, Session]:
        """What a token allows to do by this method (HEAD counts as GET), and the session that it is about. Raises
        NotFound for a token that allows nothing of the kind, LinkExpired."""
        link = self._link(token)
        if link is None or link.method != ("GET" if method == "HEAD" else method):
            raise _no_link()
        if link.expires_at <= now():
            raise LinkExpired("This link has expired.")
        try:
            session = await self._store.public_session(link.session_id)
        except NotFound:
            raise _no_link() from None
        if session.key != link.session_key:
            raise _no_link()
        return link, session

    def session_id(self, token: str) -> str | None:
        """The id of the session that a token is about; None for one that isn't ours."""
        link = self._link(token)
        return None if link is None else link.session_id

    def _link(self, token: str) -> Link | None:
        """What a token says; None for one that isn't ours, or whose API key is gone."""
        sealed = _decode(token) if len(token) <= _MAX_TOKEN else None
        if sealed is None or len(sealed) <= _MAC_BYTES:
            return None
        mac, content = sealed[:_MAC_BYTES], sealed[_MAC_BYTES:]
        try:
            *fields, key_id = json.loads(content)
            digests = self._api_keys.digests_of(key_id)
        except (ValueError, TypeError):
            return None
        # The content is a stranger's until this has been compared.
        if not any(hmac.compare_digest(mac, self._mac(content, digest)) for digest in digests):
            return None
        session_id, session_key, path, method, expires_at, max_bytes = fields
        if not self._api_keys.may(key_id, "read" if method == "GET" else "write"):
            return None
        return Link(session_id, session_key, tuple(path.split("/")), method, expires_at, max_bytes)

    def _mac(self, content: bytes, key_digest: str) -> bytes:
        """The HMAC of a token's content, bound to the API key with this digest."""
        bound = hmac.digest(self._key, key_digest.encode(), hashlib.sha256)
        return hmac.digest(bound, content, hashlib.sha256)[:_MAC_BYTES]


def signing_key(file: Path) -> bytes:
    """The key that links are signed with, kept in `file`, which is made at the first call. Raises OSError."""
    if not file.exists():
        draft = file.with_suffix(".new")
        draft.unlink(missing_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as opened:
            opened.write(secrets.token_bytes(_KEY_BYTES))
            opened.flush()
            os.fsync(opened.fileno())
        draft.rename(file)
        sync(file.parent)
    return file.read_bytes()


def _encode(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def _decode(token: str) -> bytes | None:
    """The bytes of a token; None for what isn't one, or is another spelling of one."""
    try:
        content = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except ValueError:
        return None
    return content if _encode(content) == token else None


def _no_link() -> NotFound:
    return NotFound(
        "There is no such link, or what it led to is gone.",
        hint="Whoever gave you the link can make another: POST /api/sessions/{id}/links.",
        code="no_link",
    )
