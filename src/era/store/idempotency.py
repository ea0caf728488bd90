"""Rows of idempotency keys: claimed, answered, looked up, forgotten after a day."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from era.core.models import Answered, Claim, Claimed, KeptOutputs, OwnedId, Session, now
from era.errors import Conflict
from era.store import dialects
from era.store.commits import Commits
from era.store.outputs import COLUMNS, output_values
from era.store.records import RUNS, record_of
from era.store.tables import idempotency_keys as keys
from era.store.tables import runs

KEPT_MICROS = 24 * 3600 * 1_000_000

_THIS = (keys.c.scope == bindparam("of_scope")) & (keys.c.key == bindparam("of_key"))
_LOOK_UP = select(
    keys.c.request_hash,
    keys.c.env_mark,
    keys.c.run_id,
    keys.c.answer,
    *(keys.c[name] for name in COLUMNS),
).where(_THIS, keys.c.created_at >= bindparam("since"))
_RUN = RUNS.where(runs.c.id == bindparam("run_id"))
_FORGET_OLD = delete(keys).where(_THIS, keys.c.created_at < bindparam("since"))
_RELEASE = delete(keys).where(_THIS)
_FORGET_ALL = delete(keys).where(keys.c.created_at < bindparam("since"))


class IdempotencyRows(Commits):
    """The part of SqlStore that deals in idempotency keys."""

    async def claimed(self, session_id: OwnedId, claim: Claim) -> Claimed | None:
        def job(connection: Connection, scope: Session | str) -> Claimed | None:
            found = connection.execute(_LOOK_UP, _place(claim, scope) | {"since": now() - KEPT_MICROS}).one_or_none()
            if found is None:
                return None
            request_hash, env_mark, run_id, answer, *kept = found
            run = None if run_id is None else record_of(connection.execute(_RUN, {"run_id": run_id}).one())
            return Claimed(request_hash, env_mark, run, answer, KeptOutputs(*kept))

        if session_id.id:
            return await self._read_live(session_id, job)
        return await self._read(lambda connection: job(connection, session_id.owner))

    async def forget_keys(self) -> int:
        values = {"since": now() - KEPT_MICROS}
        return await self._write(lambda connection: connection.execute(_FORGET_ALL, values).rowcount)

    def _claim(
        self,
        connection: Connection,
        claim: Claim | None,
        scope: Session | str,
        *,
        run_id: str | None = None,
    ) -> None:
        """Claim a key, for the session or the owner that scopes it. Raises Conflict where another process was
        faster."""
        if claim is None:
            return
        place, at = _place(claim, scope), now()
        connection.execute(_FORGET_OLD, place | {"since": at - KEPT_MICROS})
        values = {
            "scope": place["of_scope"],
            "key": claim.key,
            "request_hash": claim.request_hash,
            "env_mark": claim.env_mark,
            "session_key": scope.key if isinstance(scope, Session) else None,
            "run_id": run_id,
            "created_at": at,
        }
        try:
            connection.execute(insert(keys).values(values))
        except self._errors as error:
            if dialects.is_taken(error):
                raise Conflict(
                    "A request with this key is under way.", hint="Ask again once it has ended.", code="run_under_way"
                ) from None
            raise

    def _answer(self, connection: Connection, claim: Claim, scope: Session | int | str, values: Any) -> None:
        connection.execute(update(keys).where(_THIS).values(values), _place(claim, scope))

    def _answer_run(self, connection: Connection, session_key: int, answered: Answered | None) -> None:
        """Store what a run was answered, or give its key back where it didn't run."""
        if answered is None:
            return
        if answered.data is None:
            connection.execute(_RELEASE, _place(answered.claim, session_key))
            return
        kept = {} if answered.outputs is None else output_values(answered.outputs)
        self._answer(connection, answered.claim, session_key, {"answer": answered.data, **kept})


def _place(claim: Claim, scope: Session | int | str) -> dict[str, Any]:
    """Where a claim stands: keys are apart for each route and for each session (or its key); those of creation for each
    owner."""
    within = scope.key if isinstance(scope, Session) else scope
    return {"of_scope": f"{claim.route}:{within}", "of_key": claim.key}
