"""Quotas in a cluster: sixty-four calls at once, over several hosts, get all that may be and not one more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest

from era.core.cluster.homes import Host
from era.core.models import Use, now
from era.core.owners.quotas import Quotas
from era.core.owners.usage import day_of
from era.errors import QuotaReached, RateReached, Unavailable
from era.store.homes import HomeRows
from era.store.metadata import SqlStore
from tests.owners import mine
from tests.store.rows import execute, opened

CALLS = 64
HOSTS = 3
MIB = 1 << 20
KEYS: Mapping[str, Mapping[str, int]] = {"k": {"runs_per_minute": 3, "sandboxes": 3}}


@dataclass
class Counting:
    """A host that counts for quotas."""

    store: SqlStore
    homes: HomeRows
    quotas: Quotas


@pytest.fixture
async def hosts(url: str) -> AsyncIterator[list[Counting]]:
    async with AsyncExitStack() as stack:
        hosts = []
        for n in range(HOSTS):
            store = await stack.enter_async_context(opened(url, alone=False))
            homes = await store.homes()
            await homes.join(Host(f"h{n}", ""), 3600.0)
            counts = store.quota_counts(f"h{n}")
            hosts.append(Counting(store, homes, Quotas(store.usage, {}, lambda key: KEYS.get(key, {}), counts)))
        yield hosts


async def set_quotas(hosts: list[Counting], **quotas: int | None) -> None:
    """Set quotas at the first host, of which the others learn."""
    await hosts[0].quotas.set("default", quotas)
    for host in hosts[1:]:
        await host.quotas.open()


async def at_once(calls: list[Awaitable[Any]]) -> tuple[list[Any], list[BaseException]]:
    """What was let through, and the errors of the others."""
    done = await asyncio.gather(*calls, return_exceptions=True)
    return [each for each in done if not isinstance(each, BaseException)], [
        each for each in done if isinstance(each, BaseException)
    ]


def asked(hosts: list[Counting], which: Callable[[int], str]) -> list[Awaitable[Any]]:
    """Calls that hold sandboxes of so named sessions, 1 MiB each, each at the next host."""
    return [hosts[n % HOSTS].quotas.hold(mine(which(n)), MIB) for n in range(CALLS)]


async def test_runs_a_minute(hosts: list[Counting], url: str) -> None:
    await set_quotas(hosts, runs_per_minute=10)

    async def run(n: int, key: str = "") -> None:
        async with hosts[n % HOSTS].quotas.running(replace(mine(f"s{n}"), key_id=key), MIB):
            pass

    begun, errors = await at_once([run(n) for n in range(CALLS)])
    assert len(begun) == 10
    assert {type(error) for error in errors} == {RateReached}
    [details] = {str(error.details) for error in errors if isinstance(error, RateReached)}
    assert details == str({"quota": "runs_per_minute", "of": "owner", "limit": 10, "used": 10})
    assert all(1 <= (error.retry_after or 0) <= 60 for error in errors if isinstance(error, RateReached))
    assert sum(host.quotas.in_use("default")["runs_per_minute"] for host in hosts) == 10
    # A key's own count the same, beside its owner's; and of another owner nothing counts.
    await set_quotas(hosts, runs_per_minute=15)
    begun, errors = await at_once([run(n, "k") for n in range(CALLS)])
    assert len(begun) == 3
    assert {error.details["of"] for error in errors if isinstance(error, RateReached)} == {"key"}
    begun, _ = await at_once([run(n) for n in range(CALLS)])
    assert len(begun) == 2
    execute(url, "DELETE FROM quota_runs WHERE kind = 'owner'")
    await run(0)


async def test_sandboxes_and_memory(hosts: list[Counting], url: str) -> None:
    """A session's sandbox counts once however many hold it, and until the last of them lets it go."""
    await set_quotas(hosts, sandboxes=7)
    held, errors = await at_once(asked(hosts, lambda n: f"s{n}"))
    assert len(held) == 7
    assert {type(error) for error in errors} == {QuotaReached}
    [full] = {error.details["used"]: error for error in errors if isinstance(error, QuotaReached)}.values()
    assert full.details["used"] == 7
    for release in held[:3]:
        await release()
    again, _ = await at_once(asked(hosts, lambda n: f"s{n % (5 * HOSTS)}"))
    assert execute(url, "UPDATE quota_sandboxes SET memory = memory") == 7
    for release in (*held[3:], *again):
        await release()
    assert execute(url, "DELETE FROM quota_sandboxes") == 0

    await set_quotas(hosts, sandboxes=None, memory_mb=5)
    held, errors = await at_once(asked(hosts, lambda n: f"s{n}"))
    assert len(held) == 5
    assert {error.details["used"] for error in errors if isinstance(error, QuotaReached)} == {5}


async def test_the_longest_id_of_a_session_counts(hosts: list[Counting]) -> None:
    await set_quotas(hosts, sandboxes=1)
    longest = "s" * 128
    release = await hosts[0].quotas.hold(mine(longest), MIB)
    with pytest.raises(QuotaReached) as full:
        await hosts[1].quotas.hold(mine("b"), MIB)
    assert full.value.details["filled_by"] == [longest]
    await release()
    await hosts[1].quotas.hold(mine("b"), MIB)


async def test_a_dead_hosts_sandboxes_do_not_count(hosts: list[Counting]) -> None:
    await set_quotas(hosts, sandboxes=1)
    await hosts[0].quotas.hold(mine("a"), MIB)
    with pytest.raises(QuotaReached) as full:
        await hosts[1].quotas.hold(mine("b"), MIB)
    assert full.value.details["filled_by"] == ["a"]
    await hosts[0].homes.leave("h0")
    await hosts[1].quotas.hold(mine("a"), MIB)  # which has moved there
    with pytest.raises(QuotaReached):
        await hosts[2].quotas.hold(mine("b"), MIB)


async def test_what_was_in_use_before_there_was_a_quota_counts(hosts: list[Counting]) -> None:
    releases = [await hosts[0].quotas.hold(mine(f"s{n}"), MIB) for n in range(3)]
    await set_quotas(hosts, sandboxes=3)
    await hosts[0].quotas.open()
    with pytest.raises(QuotaReached):
        await hosts[1].quotas.hold(mine("b"), MIB)
    await releases[0]()
    await hosts[1].quotas.hold(mine("b"), MIB)


async def test_what_could_not_be_taken_away_is_with_the_next_heartbeat(
    hosts: list[Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    await set_quotas(hosts, sandboxes=1)
    release = await hosts[0].quotas.hold(mine("a"), MIB)

    async def away(*_: object, **__: object) -> None:
        raise Unavailable("the database can't be reached")

    with monkeypatch.context() as broken:
        broken.setattr(hosts[0].quotas._counts, "correct", away)
        await release()
        with pytest.raises(QuotaReached):
            await hosts[1].quotas.hold(mine("b"), MIB)
    await hosts[0].quotas.open()
    await hosts[1].quotas.hold(mine("b"), MIB)


async def test_a_day_that_is_used_up_elsewhere(hosts: list[Counting]) -> None:
    """No run begins once it is, though this host hasn't heard of it by a heartbeat."""
    await set_quotas(hosts, cpu_seconds_per_day=1)
    await hosts[0].store.usage.add_use(Use("default", "", day_of(now()), 1, 1_000_000, 0))
    with pytest.raises(RateReached):
        async with hosts[1].quotas.running(mine("s"), 0):
            pass
