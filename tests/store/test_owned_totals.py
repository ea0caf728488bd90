"""Quotas of sessions and of their files: what they let through is what counting everything would."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Connection

from era.core.metadata import Retention
from era.core.models import DEFAULT_OWNER, NewCopy, OwnedId, Snapshot
from era.core.owners.quotas import Bound
from era.errors import QuotaReached
from era.store import quotas
from era.store.engine.owned_totals import OwnedTotals
from era.store.metadata import SqlStore
from tests.owners import mine
from tests.soaking import soak_the_rest
from tests.store.rows import new, opened

MIB = 1 << 20
NAMES = [f"s{number}" for number in range(8)]

SHORT = (3, 100)
"""A seed and a number of calls: few, among which what is changed below shows all the same."""


@dataclass
class Model:
    """What there is, and what quotas there are."""

    most: dict[str, int]
    sizes: dict[str, int] = field(default_factory=dict)
    """MiB of the sessions that are there."""

    removed: dict[str, int] = field(default_factory=dict)

    def bounds(self, _who: OwnedId, *names: str) -> Sequence[Bound]:
        return [
            Bound("owner", DEFAULT_OWNER, name, self.most[name], lambda _: None) for name in names if self.most[name]
        ]

    def takes(self, sizes: dict[str, int]) -> bool:
        """Whether these may be there afterwards."""
        for name, used in (("sessions", len), ("disk_mb", lambda each: sum(each.values()))):
            before, after = used(self.sizes), used(sizes)
            if after > before and self.most[name] and after > self.most[name]:
                return False
        return True


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "of a cluster"])
@pytest.mark.parametrize("seed_and_calls", soak_the_rest([SHORT, (0, 300), (1, 300), (2, 300)], 1), ids=str)
async def test_a_quota_lets_through_what_counting_would(url: str, seed_and_calls: tuple[int, int], alone: bool) -> None:
    assert await disagreements(url, *seed_and_calls, alone=alone) == 0


@pytest.mark.parametrize("weakness", ["forget", "add"])
async def test_the_model_tells(sqlite_url: str, weakness: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It notices what is kept although quotas were changed, and what isn't added to that."""
    monkeypatch.setattr(OwnedTotals, weakness, {"forget": lambda *_: None, "add": lambda *_: True}[weakness])
    assert await disagreements(sqlite_url, *SHORT)


async def disagreements(url: str, seed: int, calls: int, *, alone: bool = True) -> int:
    """How many of these calls at random ended otherwise than the model's."""
    chance, wrong = random.Random(seed), 0
    async with opened(url, Retention(), alone=alone) as store:
        model = Model({"sessions": 6, "disk_mb": 20})
        store.bounds = model.bounds
        for _ in range(calls):
            after, call = step(model, store, chance)
            allowed = model.takes(after)
            try:
                await call()
                done = True
            except QuotaReached:
                done = False
            wrong += done is not allowed
            if done:
                model.removed |= {name: size for name, size in model.sizes.items() if name not in after}
                model.sizes = after
                model.removed = {name: size for name, size in model.removed.items() if name not in after}
            if chance.random() < 0.1:
                model.most = {"sessions": chance.choice([0, 5, 6]), "disk_mb": chance.choice([0, 15, 20])}
                await store.usage.set_owner(DEFAULT_OWNER, {})
    return wrong


def step(model: Model, store: SqlStore, chance: random.Random) -> tuple[dict[str, int], Callable[[], Any]]:
    """A call at random, and which sessions there are after it if it is let through."""
    free = [name for name in NAMES if name not in model.sizes]
    if not model.sizes or (free and chance.random() < 0.3):
        if model.removed and chance.random() < 0.5:
            name = chance.choice(list(model.removed))
            return model.sizes | {name: model.removed[name]}, partial(store.restore_session, mine(name))
        name = chance.choice(free)
        if model.sizes and chance.random() < 0.5:
            source = chance.choice(list(model.sizes))
            return model.sizes | {name: model.sizes[source]}, partial(store.duplicate, NewCopy(mine(source), name))
        return model.sizes | {name: 0}, partial(store.create_session, new(name))
    name = chance.choice(list(model.sizes))
    if chance.random() < 0.25:
        return {each: size for each, size in model.sizes.items() if each != name}, partial(
            store.delete_session, mine(name)
        )
    size = chance.randrange(8)
    snapshot = Snapshot("0" * 64 if size else None, 1 if size else 0, size * MIB)
    return model.sizes | {name: size}, partial(store.commit, mine(name), "files", data=None, snapshot=snapshot)


async def test_only_what_a_session_had_and_has_is_looked_at(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an owner has much, and it is known that the quota leaves room."""
    counted = 0
    used = quotas._used

    def counting(connection: Connection, bound: Bound, only: str | None = None) -> int:
        nonlocal counted
        counted += only is None
        return used(connection, bound, only)

    monkeypatch.setattr(quotas, "_used", counting)
    async with opened(sqlite_url) as store:
        store.bounds = Model({"sessions": 6, "disk_mb": 20}).bounds
        for name in NAMES[:6]:
            await store.create_session(new(name))
        assert counted == 1
        with suppress(QuotaReached):
            await store.create_session(new(NAMES[6]))
        assert counted == 2
