"""API keys in memory, as hosts of a cluster read them again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from era.core.models import now
from era.core.owners.api_keys import OPERATOR, ApiKey, ApiKeys, Change
from era.errors import NotFound, Unavailable


class Rows:
    """An ApiKeyStore that drops nothing."""

    def __init__(self) -> None:
        self.rows: list[tuple[ApiKey, str]] = []

    async def add_api_key(self, key: ApiKey, digest: str) -> None:
        self.rows.append((key, digest))

    async def api_keys(self) -> Sequence[tuple[ApiKey, str]]:
        return self.rows

    async def change_api_key(self, key_id: str, change: Change) -> tuple[ApiKey, str] | None:
        self.rows = [change(*row) if row[0].id == key_id else row for row in self.rows]
        return next((row for row in self.rows if row[0].id == key_id), None)

    async def drop_api_key(self, key_id: str) -> bool:
        raise Unavailable("the database is away")


class DroppingRows(Rows):
    async def drop_api_key(self, key_id: str) -> bool:
        before = len(self.rows)
        self.rows = [row for row in self.rows if row[0].id != key_id]
        return len(self.rows) < before


async def test_a_key_whose_row_stays_is_revoked_all_the_same() -> None:
    rows = Rows()
    here, other = ApiKeys(rows, "operator"), ApiKeys(rows, "operator")
    key, text = await here.create("ann", "")
    assert other.caller(text.encode()) is None
    await other.look_for(text.encode())
    assert other.caller(text.encode()) is not None
    with pytest.raises(Unavailable):
        await here.revoke(key.id)
    await here.open()
    assert here.caller(text.encode()) is None


async def test_what_another_host_has_changed_is_known_when_it_passes_somebody_on() -> None:
    """Its rows are read with the heartbeat only, and who was let in there isn't shut out here."""
    rows = Rows()
    here, other = ApiKeys(rows, "operator"), ApiKeys(rows, "operator")
    key, first = await here.create("ann", "", scopes=["read"], expires_at=now() - 1)
    await other.open()
    await here.change(key.id, expires_at=None)
    await here.change(key.id, scopes=("read", "run"))
    _, second = await here.rotate(key.id, 3600)
    for text in (first, second):
        caller = here.caller(text.encode())
        assert caller is not None
        stale = ApiKeys(rows, "operator")
        stale._stored, stale._by_id = dict(other._stored), dict(other._by_id)
        assert not stale.admits(caller, "run")
        assert await stale.known(caller) == caller
        assert stale.admits(caller, "run")
        assert stale.admits(caller, "read")
        assert not stale.admits(caller, "write")


async def test_another_host_lets_in_with_what_a_key_has_here() -> None:
    """It may not have been told yet that the key was changed or revoked here."""
    keys = ApiKeys(DroppingRows(), "operator")
    key, text = await keys.create("ann", "", scopes=["read", "run", "admin"])
    caller = keys.caller(text.encode())
    assert caller is not None
    assert await keys.known(caller) is caller
    await keys.change(key.id, scopes=("read",))
    narrowed = await keys.known(caller)
    assert narrowed is not None
    assert (set(narrowed.scopes), narrowed.is_operator) == ({"read"}, False)
    await keys.revoke(key.id)
    assert await keys.known(caller) is None
    assert await keys.known(OPERATOR) is OPERATOR


async def test_a_key_made_at_another_host_can_be_changed_here() -> None:
    rows = DroppingRows()
    here, other = ApiKeys(rows, "operator"), ApiKeys(rows, "operator")
    key, text = await other.create("ann", "")
    assert (await here.change(key.id, description="new")).description == "new"
    assert here.caller(text.encode()) is not None
    await here.revoke(key.id)
    with pytest.raises(NotFound):
        await here.change(key.id, description="newer")
    with pytest.raises(NotFound):
        await here.revoke("key_that_never_was")


async def test_a_revocation_that_is_repeated_while_keys_are_read_holds() -> None:
    class SlowRows(DroppingRows):
        are_read, may_tell = asyncio.Event(), asyncio.Event()

        async def api_keys(self) -> Sequence[tuple[ApiKey, str]]:
            rows = self.rows
            self.are_read.set()
            await self.may_tell.wait()
            return rows

    rows = SlowRows()
    keys = ApiKeys(rows, "operator")
    key, text = await keys.create("ann", "")
    reading = asyncio.create_task(keys.open())
    await rows.are_read.wait()
    await keys.revoke(key.id)
    again = asyncio.create_task(keys.revoke(key.id))
    await asyncio.sleep(0.01)
    rows.may_tell.set()
    await reading
    with pytest.raises(NotFound):
        await again
    assert keys.caller(text.encode()) is None
