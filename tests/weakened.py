"""Weakened builds of parts that several tests share."""

from __future__ import annotations

from collections.abc import Hashable

from era.core.concurrency.fair_limiter import FairLimiter, Release


class FirstCome(FairLimiter):
    """Slots in the order in which they are asked for, whoever asks."""

    async def take(self, owner: str, session: Hashable = "") -> Release:
        return await super().take("anybody")
