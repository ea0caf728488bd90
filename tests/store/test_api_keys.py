"""Keys and quotas that two hosts change, each with a memory older than the rows: neither undoes what the other did."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest

from era.core.models import now
from era.core.owners.api_keys import ApiKey, ApiKeys
from era.core.owners.quotas import WORDS, Quotas
from era.errors import Conflict, NotFound, Unavailable
from era.store.metadata import SqlStore
from tests.store.postgres_proxy import PostgresProxy, postgres_proxy
from tests.store.rows import opened

__all__ = ["postgres_proxy"]

HOUR = 3_600_000_000


@pytest.fixture
async def stores(url: str) -> AsyncIterator[list[SqlStore]]:
    """Those of two hosts, on one database of each kind."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(opened(url, alone=False)) for _ in range(2)]


@pytest.fixture
def hosts(stores: list[SqlStore]) -> list[ApiKeys]:
    return [ApiKeys(store.api_keys, "operator") for store in stores]


async def made(hosts: Sequence[ApiKeys], **fields: Any) -> tuple[str, str]:
    """The id and the text of a key that all hosts know, and no host is told any more of."""
    key, text = await hosts[0].create("ann", "before", **fields)
    for host in hosts[1:]:
        await host.open()
    return key.id, text


async def stored(hosts: Sequence[ApiKeys], key_id: str) -> ApiKey:
    """A key as all hosts have it once they have read it again."""
    for host in hosts:
        await host.open()
    [key] = {repr(host.get(key_id)): host.get(key_id) for host in hosts}.values()
    return key


def let_in(host: ApiKeys, *texts: str) -> list[bool]:
    return [host.caller(text.encode()) is not None for text in texts]


async def test_a_change_gives_no_life_to_a_secret_that_another_host_has_ended(hosts: list[ApiKeys]) -> None:
    key_id, leaked = await made(hosts)
    _, fresh = await hosts[0].rotate(key_id, 0)
    assert let_in(hosts[1], leaked, fresh) == [True, False], "its memory isn't old"
    assert (await hosts[1].change(key_id, description="after")).description == "after"
    assert let_in(hosts[1], leaked, fresh) == [False, True]
    assert (await stored(hosts, key_id)).description == "after"
    for host in hosts:
        assert let_in(host, leaked, fresh) == [False, True]


async def test_changes_of_different_fields_hold_both(hosts: list[ApiKeys]) -> None:
    key_id, _ = await made(hosts)
    await hosts[0].change(key_id, scopes=("read",), quotas={"sessions": 1, "disk_mb": 2})
    end = now() + HOUR
    changed = await hosts[1].change(key_id, expires_at=end, quotas={"sandboxes": 3})
    assert (changed.description, changed.scopes, changed.expires_at) == ("before", ("read",), end)
    assert changed.quotas == {"sessions": 1, "disk_mb": 2, "sandboxes": 3}
    taken_back = await hosts[0].change(key_id, quotas={"disk_mb": None})
    assert taken_back == replace(changed, quotas={"sessions": 1, "sandboxes": 3})
    assert await hosts[0].change(key_id) == taken_back
    assert await stored(hosts, key_id) == taken_back


async def test_the_secret_before_is_that_of_the_row(hosts: list[ApiKeys]) -> None:
    key_id, first = await made(hosts)
    _, second = await hosts[0].rotate(key_id, 0)
    _, third = await hosts[1].rotate(key_id, 3600)
    assert let_in(hosts[1], first, second, third) == [False, True, True]
    await stored(hosts, key_id)
    assert let_in(hosts[0], first, second, third) == [False, True, True]


async def test_whether_a_key_has_expired_is_as_the_row_says(hosts: list[ApiKeys]) -> None:
    key_id, _ = await made(hosts, expires_at=now() + HOUR)
    await hosts[0].change(key_id, expires_at=now() - 1)
    with pytest.raises(Conflict):
        await hosts[1].rotate(key_id, 0)
    await hosts[1].change(key_id, expires_at=None)
    _, text = await hosts[0].rotate(key_id, 0)
    assert let_in(hosts[0], text) == [True]


async def test_a_key_that_another_host_has_revoked_is_not_changed(hosts: list[ApiKeys]) -> None:
    """And lets in no more at a host that has come to know of it so."""
    for call in ("change", "rotate"):
        key_id, text = await made(hosts)
        await hosts[0].revoke(key_id)
        assert let_in(hosts[1], text) == [True]
        with pytest.raises(NotFound):
            await (hosts[1].rotate(key_id, 3600) if call == "rotate" else hosts[1].change(key_id, description="x"))
        assert let_in(hosts[1], text) == [False], call
        assert hosts[1].list() == []


async def test_all_changes_at_once_hold(hosts: list[ApiKeys], stores: list[SqlStore]) -> None:
    """Of a key and of an owner, at both hosts, and whichever comes first."""
    key_id, first = await made(hosts)
    quotas = [Quotas(store.usage, {}, lambda _: {}) for store in stores]
    names = list(WORDS)
    rotating = asyncio.create_task(hosts[0].rotate(key_id, 0))
    await asyncio.gather(
        rotating,
        *(hosts[n % 2].change(key_id, quotas={name: n + 1}) for n, name in enumerate(names)),
        *(quotas[n % 2].set("ann", {name: n + 1}) for n, name in enumerate(names)),
    )
    every = {name: n + 1 for n, name in enumerate(names)}
    assert (await stored(hosts, key_id)).quotas == every
    assert let_in(hosts[1], first, rotating.result()[1]) == [False, True]
    for each in quotas:
        await each.open()
        assert each.own("ann") == every


async def test_quotas_that_two_hosts_set_for_an_owner_hold_both(stores: list[SqlStore]) -> None:
    here, there = (Quotas(store.usage, {"sessions": 9}, lambda _: {}) for store in stores)
    await here.set("ann", {"sessions": 1, "disk_mb": 2})
    await there.set("ann", {"sandboxes": 3})
    assert there.own("ann") == {"sessions": 1, "disk_mb": 2, "sandboxes": 3}
    await here.set("ann", {"sessions": None})
    for each in (here, there):
        await each.open()
        assert each.own("ann") == {"disk_mb": 2, "sandboxes": 3}
        assert each.of_owner("ann")["sessions"] == 9


@pytest.mark.parametrize("when", ["before", "after"])
async def test_what_may_have_been_stored_is_not_said_to_be(
    postgres_url: str, postgres_proxy: PostgresProxy, when: str
) -> None:
    """Nor does it change what is in memory, until that is read again or the call is made again."""
    async with opened(postgres_proxy.url(postgres_url)) as store:
        keys, quotas = ApiKeys(store.api_keys, "operator"), Quotas(store.usage, {}, lambda _: {})
        key_id, first = await made([keys])
        before = keys.get(key_id)
        for call in (
            lambda: keys.change(key_id, description="after"),
            lambda: keys.rotate(key_id, 0),
            lambda: quotas.set("ann", {"sessions": 1}),
        ):
            await store.check_writable()
            postgres_proxy.cut(when)
            with pytest.raises(Unavailable, match="not known"):
                await call()
        assert postgres_proxy.cuts == 3
        assert (keys.get(key_id), let_in(keys, first), quotas.own("ann")) == (before, [True], {})
        _, second = await keys.rotate(key_id, 0)
        assert let_in(keys, first, second) == [False, True]
        assert keys.get(key_id).description == {"before": "before", "after": "after"}[when]
        await quotas.set("ann", {"disk_mb": 2})
        assert quotas.own("ann") == ({"sessions": 1} if when == "after" else {}) | {"disk_mb": 2}
