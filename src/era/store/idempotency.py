"""Idempotency keys (`Idempotency-Key` of a request): claimed, answered, looked up, dropped after a day.

Not to be confused with API keys (api_keys.py) or with keys of KV (storage_items.py). core/sessions/idempotency.py has
the rules. Clients send a key with every run, so the statements on the path of one are precompiled.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

from sqlalchemy import Connection, String, bindparam, cast, delete, func, insert, null, select, tuple_, update

from era.core.models import Answered, Claim, Claimed, KeptOutputs, OwnedId, Session, now
from era.errors import Conflict, Unavailable
from era.store.engine.dialects import Answer, Asked, Precompiled, raising_if_taken, together
from era.store.engine.tables import idempotency_keys as keys
from era.store.engine.tables import runs, sessions
from era.store.outputs import OUTPUT_COLUMNS, output_values
from era.store.records import RUNS, record_from_row
from era.store.rows import Rows
from era.store.session_lookup import IS_PRESENT, OF_OWNER, owned_id_values, read_session

_KEPT_MICROS = 24 * 3600 * 1_000_000
_ROW_BYTES = 512
"""What a key takes besides its answer, about."""

_COUNTED_BYTES = 1 << 20
"""What the answers within a scope take is counted each time that so much has come, on average: it reads the index of
all of them, which for many short ones costs much more than to add one."""

_NO_OUTPUTS = KeptOutputs(None, None)
_IS_KEPT = keys.c.created_at >= bindparam("since")
_IS_CLAIM = (keys.c.scope == bindparam("of_scope")) & (keys.c.key == bindparam("of_key"))
_FIND = select(
    keys.c.request_hash, keys.c.env_mark, keys.c.run_id, keys.c.answer, *(keys.c[name] for name in OUTPUT_COLUMNS)
).where(_IS_KEPT)
_find = Precompiled(_FIND.where(_IS_CLAIM))
_SESSION = select(cast(sessions.c.key, String)).where(OF_OWNER, IS_PRESENT).scalar_subquery()
_find_in_session = Precompiled(
    _FIND.where(keys.c.scope == bindparam("of_route", type_=String) + ":" + _SESSION, keys.c.key == bindparam("of_key"))
)
_RUN = RUNS.where(runs.c.id == bindparam("run_id"))
_drop_if_old = Precompiled(delete(keys).where(_IS_CLAIM, keys.c.created_at < bindparam("since")))
_claim = Precompiled(
    insert(keys).values(
        scope=bindparam("of_scope"),
        key=bindparam("of_key"),
        request_hash=bindparam("new_hash"),
        env_mark=bindparam("new_mark"),
        session_key=bindparam("new_session"),
        run_id=bindparam("new_run"),
        created_at=bindparam("at"),
    )
)
_answer = Precompiled(
    update(keys)
    .where(_IS_CLAIM)
    .values(
        {
            name: bindparam(f"new_{name}", type_=keys.c[name].type)
            for name in ("answer", "answer_bytes", *OUTPUT_COLUMNS)
        }
    )
)
_OF_SCOPE = (keys.c.scope == bindparam("of_scope")) & keys.c.answer_bytes.is_not(None)
_TAKEN = (
    select(keys.c.created_at, func.sum(keys.c.answer_bytes).over(order_by=keys.c.created_at.desc()).label("bytes"))
    .where(_OF_SCOPE)
    .subquery()
)
"""For each answer within a scope, what this and those after it take."""

_LAST_BEYOND = select(func.max(_TAKEN.c.created_at)).where(
    _TAKEN.c.bytes > bindparam("most"),
    _TAKEN.c.created_at < select(func.max(keys.c.created_at)).where(_OF_SCOPE).scalar_subquery(),
)
_SOME_UNTIL = (
    select(keys.c.scope, keys.c.key)
    .where(_OF_SCOPE, keys.c.created_at <= bindparam("until"))
    .order_by(keys.c.created_at)
    .limit(500)
)
_DROP_ANSWERS = (
    update(keys)
    .where(tuple_(keys.c.scope, keys.c.key).in_(_SOME_UNTIL))
    .values({"answer": "", **dict.fromkeys(("answer_bytes", *OUTPUT_COLUMNS), null())})
)
_drop = Precompiled(delete(keys).where(_IS_CLAIM))
_IS_OLD = keys.c.created_at < bindparam("since")
_OLD = select(keys.c.scope, keys.c.key).where(_IS_OLD).order_by(keys.c.created_at).limit(500)
_DROP_OLD = delete(keys).where(tuple_(keys.c.scope, keys.c.key).in_(_OLD))

type Scope = Session | int | str
"""Within what a key is unique: a session (or its key) or, where the request is to make a session, its owner."""


class ClaimRows(Rows):
    async def find_claim(self, session_id: OwnedId, claim: Claim) -> Claimed | None:
        since = now() - _KEPT_MICROS
        if not session_id.id:
            values = _claim_parameters(claim, session_id.owner) | {"since": since}
            return await self.database.read(lambda rows: _claimed(rows, _find.first(rows, values)))

        def in_session(connection: Connection, _: Session, found: Answer) -> Claimed | None:
            return _claimed(connection, found.row)

        values = {"of_route": claim.route, "of_key": claim.key, "since": since} | owned_id_values(session_id)
        finding = _find_in_session, values
        return await read_session(self.database, self.retention, session_id, in_session, finding)

    async def prune_idempotency_keys(self) -> int:
        return await self.until_none_left(_DROP_OLD, {"since": now() - _KEPT_MICROS})

    async def bound_answers(self, claim: Claim, scope: Scope, added: int) -> None:
        """Drop the oldest answers within the scope of a claim that take more than may be kept together, if it is time
        now that about `added` bytes have come. The newest stays. Where the database fails, another time does it.

        It is no part of the transaction that adds one: PostgreSQL would take its look at so many rows for conflicts
        with whoever adds one meanwhile.
        """
        if secrets.randbelow(_COUNTED_BYTES) >= added:
            return
        of_scope = {"of_scope": _claim_parameters(claim, scope)["of_scope"]}
        values = of_scope | {"most": self.retention.answer_bytes}
        with suppress(Unavailable):
            until = await self.database.read(lambda rows: rows.execute(_LAST_BEYOND, values).scalar_one())
            if until is not None:
                await self.until_none_left(_DROP_ANSWERS, of_scope | {"until": until})


def _claimed(connection: Connection, row: Any) -> Claimed | None:
    if row is None:
        return None
    request_hash, env_mark, run_id, answer, *outputs = row
    record = None if run_id is None else connection.execute(_RUN, {"run_id": run_id}).one_or_none()
    run = None if record is None else record_from_row(record)
    return Claimed(request_hash, env_mark, run, answer, KeptOutputs(*outputs))


def claim_key(connection: Connection, claim: Claim | None, scope: Session | str) -> None:
    """Claim a key for a request. None claims nothing. Raises Conflict where another request holds the key."""
    with raising_if_claimed():
        together(connection, *claiming(claim, scope))


def claiming(claim: Claim | None, scope: Session | str, *, run_id: str | None = None) -> Sequence[Asked]:
    """The statements that claim a key for a request, and for the run that it begins; within `raising_if_claimed`."""
    if claim is None:
        return ()
    parameters, at = _claim_parameters(claim, scope), now()
    values = {
        **parameters,
        "new_hash": claim.request_hash,
        "new_mark": claim.env_mark,
        "new_session": scope.key if isinstance(scope, Session) else None,
        "new_run": run_id,
        "at": at,
    }
    return (_drop_if_old, parameters | {"since": at - _KEPT_MICROS}), (_claim, values)


def raising_if_claimed() -> AbstractContextManager[None]:
    """Raises Conflict where the block claims a key that another request holds."""
    return raising_if_taken(
        Conflict("A request with this key is under way.", hint="Ask again once it has ended.", code="run_under_way"),
        within=keys,
    )


def answer_claim(connection: Connection, claim: Claim, scope: Scope, answer: str) -> None:
    """Store what a request was answered that runs nothing."""
    values = {"new_answer": answer, "new_answer_bytes": bytes_of(answer), **output_values(_NO_OUTPUTS, "new_")}
    _answer.execute(connection, _claim_parameters(claim, scope) | values)


def answering_run(session_key: int, answered: Answered | None, record_bytes: int) -> Sequence[Asked]:
    """The statement that stores what a run's request was answered, or frees its key where it didn't run. None is a run
    without a key. `record_bytes` is what the run's record takes, which is kept as long as the answer."""
    if answered is None:
        return ()
    of_claim = _claim_parameters(answered.claim, session_key)
    if answered.data is None:
        return ((_drop, of_claim),)
    outputs = answered.outputs or _NO_OUTPUTS
    values = {"new_answer": answered.data, "new_answer_bytes": bytes_of(answered.data, outputs) + record_bytes}
    return ((_answer, of_claim | values | output_values(outputs, "new_")),)


def bytes_of(answer: str, outputs: KeptOutputs | None = None) -> int:
    """What a key with this answer takes, about."""
    parts = () if outputs is None else output_values(outputs, "").values()
    blobs = 0 if outputs is None else outputs.blob_bytes
    return _ROW_BYTES + len(answer.encode()) + sum(len(part) for part in parts if part is not None) + blobs


def free_key(connection: Connection, claim: Claim, session_key: int) -> None:
    """Forget a key whose request did nothing."""
    _drop.execute(connection, _claim_parameters(claim, session_key))


def _claim_parameters(claim: Claim, scope: Scope) -> dict[str, Any]:
    """The parameters of `_IS_CLAIM`: each route has keys of its own within a scope."""
    within = scope.key if isinstance(scope, Session) else scope
    return {"of_scope": f"{claim.route}:{within}", "of_key": claim.key}
