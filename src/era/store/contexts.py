"""The names of contexts that have had cells."""

from __future__ import annotations

from sqlalchemy import Connection, bindparam, delete, insert, select

from era.store.database import Database
from era.store.homes import check_home
from era.store.tables import contexts

_IS_IT = (contexts.c.session_key == bindparam("of_session")) & (contexts.c.name == bindparam("of_name"))
_FIND = select(contexts.c.name).where(_IS_IT)
_DROP = delete(contexts).where(_IS_IT)


class ContextRows:
    """See core.live.contexts.ContextStore."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def note(self, session_key: int, name: str) -> bool:
        return await self._database.write(_note, session_key, name)

    async def forget(self, session_key: int, name: str) -> bool:
        return await self._database.write(_forget, session_key, name)


def _note(connection: Connection, session_key: int, name: str) -> bool:
    check_home(connection, session_key)
    if connection.execute(_FIND, {"of_session": session_key, "of_name": name}).one_or_none() is not None:
        return True
    connection.execute(insert(contexts).values(session_key=session_key, name=name))
    return False


def _forget(connection: Connection, session_key: int, name: str) -> bool:
    check_home(connection, session_key)
    return connection.execute(_DROP, {"of_session": session_key, "of_name": name}).rowcount > 0
