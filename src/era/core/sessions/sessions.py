"""Sessions: create, list, change, delete, restore. Running code in them is in runs.py."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from era.core import allowlist as allowed
from era.core import jsontext
from era.core.concurrency.turns import Liveness, Turns
from era.core.limits import Rules
from era.core.metadata import KEEP, MetadataStore, SessionChange, SessionFilter
from era.core.models import (
    Claim,
    JsonObject,
    NewSession,
    OwnedId,
    Session,
    StoredCode,
    VersionContent,
    now,
    timestamp,
)
from era.core.pool.pool import SandboxPool
from era.core.sessions.expiry import Expiry
from era.core.sessions.idempotency import IdempotencyKeys, Once, create_once
from era.errors import BadRequest, Conflict, Expired, NotFound, TooLarge

MAX_CODE_BYTES = 4 << 20
MOST_LABELS = 1000
"""Of a session: each is a row of its own, and all others' commits wait while they are written."""

type Select = Callable[[Sequence[Session]], Awaitable[Sequence[Session]]]
"""Takes some of the sessions that it is given."""


_DELETED_AT_ONCE = 500
_READ_AT_ONCE = 1 << 20
"""Characters of sessions' rows. What these have is parsed and shown by the event loop without a pause."""


class Sessions:
    """The service of everything about sessions but their runs, files, versions and setups."""

    def __init__(
        self,
        store: MetadataStore,
        pool: SandboxPool,
        turns: Turns,
        idempotency: IdempotencyKeys,
        expiry: Expiry,
        rules: Rules,
        liveness: Liveness,
        kick_setups: Callable[[], None],
        place: Callable[[Session], Awaitable[None]] | None = None,
    ) -> None:
        """`kick_setups` is called when a session may have a setup to be done; see Setups.kick. `place` is called before
        that with one that was just made; see Moves.place."""
        self._kick_setups = kick_setups
        self._place = place
        self._liveness = liveness
        self._rules = rules
        self._store = store
        self._idempotency = idempotency
        self._expiry = expiry
        self._pool = pool
        self._turns = turns

    async def create(self, new: NewSession, data: JsonObject, claim: Claim | None = None) -> Once[Session]:
        """Create a session with this data; `new.data` is made of it. Raises Conflict where the id is taken, BadRequest
        or TooLarge for values that can't be."""
        await jsontext.aside_where_long(check_metadata, new.metadata)
        self._rules.check(new.limits)
        allowed.check(new.egress)
        if not new.persistent and new.setup is not None and json.loads(new.setup).get("commands"):
            raise BadRequest(
                "A session that is not persistent keeps no files, so 'setup.commands' could leave none.",
                hint='Make it with "persistent": true.',
                code="not_persistent",
            )
        new = replace(new, data=await data_text_aside(data))
        made = await create_once(
            self._idempotency, replace(new.id, id=""), claim, lambda: self._store.create_session(new, claim)
        )
        if new.setup is not None:
            if self._place is not None and not made.replayed:
                await self._place(made.value)
            self._kick_setups()
        return made

    async def get(self, session_id: OwnedId) -> Session:
        return await self._store.session(session_id)

    async def page(self, which: SessionFilter) -> tuple[Sequence[Session], bool]:
        """The first sessions that pass the filter, newest first, fewer than its limit where they are large, and whether
        there are more. Those that have expired by now count as gone."""
        await self._expiry.sweep()
        return await self._store.session_page(which, _READ_AT_ONCE)

    async def change(self, session_id: OwnedId, change: SessionChange, data: JsonObject | None) -> Session:
        """Change settings, and `data` unless that is None. A change of data or setup waits for the run under way."""
        if change.metadata is not None:
            await jsontext.aside_where_long(check_metadata, change.metadata)
        self._rules.check(change.limits or {})
        allowed.check(change.egress or {})
        if data is None and change.setup is KEEP:
            return await self._store.change_session(session_id, change)
        async with self._turns.take(session_id):
            if change.setup is not KEEP:
                self._liveness.check_not(await self._store.session(session_id), "nothing can be installed")
            if data is not None:
                session = await self._store.session(session_id)
                change = replace(change, data=await data_text_aside(await without_view(data, session)))
            session = await self._store.change_session(session_id, change)
        self._kick_setups()
        return session

    async def store_code(self, session_id: OwnedId, code: str, description: str | None) -> StoredCode:
        """Keep code for runs that bring none. Raises TooLarge, BadRequest."""
        check_code(code)
        stored = StoredCode(code, description, now())
        await self._store.store_code(session_id, stored)
        return stored

    async def stored_code(self, session_id: OwnedId) -> StoredCode:
        """Raises NotFound where there is none."""
        session = await self._store.session(session_id)
        if session.stored is None:
            raise NotFound("no code stored", hint="Use PUT /api/sessions/{id}/code to store code")
        return session.stored

    async def delete(self, session_id: OwnedId, *, purge: bool = False, key: int | None = None) -> None:
        """Delete a session: when this returns its processes are dead and its working directory gone.

        Its rows stay for a while, so that it can be restored, unless it is to be purged; then so are the sessions that
        were gone from this id before. The rows come first, so whoever waits for a turn finds nothing; then the run
        under way loses its sandbox, or gets none. With `key`, the very session that has it and no other.
        """
        keys: Sequence[int]
        if purge:
            keys = await self._store.purge_session(session_id, key=key)
        else:
            keys = [(await self._store.delete_session(session_id, key=key)).key]
        for key in keys:
            await self._pool.release(key)
        async with self._turns.take(session_id, bounded=False):
            for key in keys:
                await self._pool.release(key)

    async def delete_all(
        self, which: SessionFilter, *, selected: Select | None = None, purge: bool = False
    ) -> Sequence[str]:
        """Delete every session that passes the filter at this moment, and that `selected` takes of those, if that is
        given. Returns their ids. Sessions that are gone already can only be purged."""
        deleted = []
        page, more = replace(which, limit=_DELETED_AT_ONCE), True
        while more:
            found, more = await self.page(page)
            for session in found if selected is None else await selected(found):
                try:
                    if which.removed:
                        # One that was restored since the page was read stays.
                        await self._store.purge_session(session.owned_id, key=session.key, only_removed=True)
                    else:
                        # All of an owner's sessions go with what had their ids before, those of a filter don't.
                        key = None if which == SessionFilter(which.owner) else session.key
                        await self.delete(session.owned_id, purge=purge, key=key)
                except (NotFound, Expired):
                    continue  # somebody else was faster
                deleted.append(session.id)
            page = replace(page, before_key=found[-1].key if found else None)
        return deleted

    async def restore(self, session_id: OwnedId) -> Session:
        """Bring back a session that expired or was deleted. Raises Conflict where its id is in use, NotFound where
        there is nothing to restore."""
        await self._expiry.sweep()
        return await self._store.restore_session(session_id)


def check_code(code: str) -> None:
    """Raises TooLarge or BadRequest for code that can't be stored or run."""
    try:
        size = len(code.encode())
    except UnicodeEncodeError:
        raise BadRequest("'code' has a lone surrogate (half of a character).") from None
    if size > MAX_CODE_BYTES:
        raise TooLarge(
            f"'code' is {size} bytes, {MAX_CODE_BYTES} are allowed.", hint="Put the rest into files of the session."
        )


def check_metadata(metadata: Any) -> None:
    """Raises BadRequest or TooLarge for labels that a session can't have."""
    data_text("metadata", metadata)
    if len(metadata) > MOST_LABELS:
        raise TooLarge(
            f"'metadata' has {len(metadata)} labels, {MOST_LABELS} are allowed.",
            hint="Put into 'data' what lists aren't filtered by.",
        )


async def data_text_aside(data: Any) -> str:
    """`data_text` of a session's data, beside the event loop where it is long."""
    return await jsontext.aside_where_long(partial(data_text, "data"), data)


def check_long_body(body: Any) -> None:
    """Raises BadRequest or TooLarge for a request's body whose `data` or `metadata` no session can have, in a thread,
    before anything else is done with them: they may have hundreds of thousands of values."""
    for field in ("data", "metadata"):
        value = body.get(field) if isinstance(body, dict) else None
        if isinstance(value, dict):
            data_text(field, certainly_own(value))


def data_text(field: str, value: Any) -> str:
    """`value`, which should be a JSON object, as compact JSON text. Raises BadRequest or TooLarge, naming the field."""
    try:
        return jsontext.data_text(value)
    except jsontext.JsonTooLarge as error:
        raise TooLarge(f"'{field}' {error}.") from None
    except jsontext.JsonProblem as error:
        raise BadRequest(f"'{field}' {error}.") from None


def data_of(session: Session | VersionContent) -> JsonObject:
    """The data of a session or version, parsed."""
    data: JsonObject = json.loads(session.data)
    return data


_STORED_FIELDS = ("code", "code_description", "code_updated_at")


def _stored_fields(stored: StoredCode | None) -> JsonObject:
    if stored is None:
        return {}
    return dict(zip(_STORED_FIELDS, (stored.code, stored.description, timestamp(stored.updated_at)), strict=True))


def data_view(data: JsonObject, stored: StoredCode | None) -> JsonObject:
    """Add the fields of stored code to a session's data, but for those that the data has as keys of its own."""
    return data | {name: value for name, value in _stored_fields(stored).items() if name not in data}


def certainly_own(data: JsonObject) -> JsonObject:
    """Return the part of a client's data that `without_view` keeps whatever the session holds."""
    return {key: value for key, value in data.items() if key not in _STORED_FIELDS or not isinstance(value, str)}


async def without_view(data: JsonObject, session: Session) -> JsonObject:
    """Drop what `data_view` had added to data that a client sends back.

    A field is dropped where it is as the view shows it, and the session's data has no such key.
    """
    shown = {key for key, value in _stored_fields(session.stored).items() if key in data and data[key] == value}
    if shown:
        shown.difference_update(await jsontext.stored(session.data))
    return {key: value for key, value in data.items() if key not in shown}


def keeping_files(session: Session) -> Session:
    """The session itself. Raises Conflict where it keeps no files."""
    if not session.persistent:
        raise Conflict(
            f"Session '{session.id}' is not persistent: it keeps no files.",
            hint='Make a session with "persistent": true.',
            code="not_persistent",
        )
    return session
