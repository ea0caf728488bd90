"""API keys in memory, as hosts of a cluster read them again and again."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from era.core.api_keys import ApiKey, ApiKeys
from era.errors import Unavailable


class Rows:
    """An ApiKeyStore that drops nothing."""

    def __init__(self) -> None:
        self.rows: list[tuple[ApiKey, str]] = []

    async def add_api_key(self, key: ApiKey, digest: str) -> None:
        self.rows.append((key, digest))

    async def api_keys(self) -> Sequence[tuple[ApiKey, str]]:
        return self.rows

    async def change_api_key(self, key: ApiKey, digest: str) -> None:
        raise AssertionError("no key is changed here")

    async def drop_api_key(self, key_id: str) -> bool:
        raise Unavailable("the database is away")


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
