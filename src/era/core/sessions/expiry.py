"""Expiry: sessions that end by themselves after a time without calls.

Theory of operation. A session with a ttl expires when nobody has called it for that long. Each call puts `expires_at`
off, but a read shouldn't cost a durable write: so it is put off only once a tenth of the ttl (ten seconds at most) has
gone by, and the session lives that much beyond `expires_at`. It never expires early. What counts is in the database
alone; a session is expired from that moment on, whether or not `Expiry` has marked it yet.

A run under way keeps its session alive, and its end is a call. An upload under way counts as a call all the time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count

import structlog

from era.core.concurrency.outages import note_outage
from era.core.metadata import MetadataStore
from era.core.models import MICROS, Session, now
from era.core.owners.quotas import Quotas
from era.core.pool.pool import SandboxPool
from era.core.ports import Cluster
from era.errors import EraError, Unavailable

log = structlog.get_logger()

MAX_TTL = 100 * 366 * 86_400
_SWEEP_SECONDS = 1.0
_TRIMMED_EVERY = 30
"""So many sweeps after the last time, removed sessions are counted: all of their rows are read for that."""


def slack(ttl: int) -> int:
    """Microseconds by which the recorded expiry of a session may be early, for a ttl in seconds."""
    return min(ttl * MICROS // 10, 10 * MICROS)


def is_due(session: Session, at: int) -> bool:
    """Whether it has expired at this time (microseconds since 1970), unless a run keeps it alive."""
    if session.ttl is None or session.expires_at is None:
        return False
    return session.expires_at + slack(session.ttl) <= at


def wants_touch(session: Session, at: int) -> bool:
    """Whether a call at this time (microseconds since 1970) has to put off the recorded expiry."""
    if session.ttl is None or session.expires_at is None:
        return False
    return at + session.ttl * MICROS >= session.expires_at + slack(session.ttl)


@asynccontextmanager
async def calling(store: MetadataStore, session: Session) -> AsyncIterator[None]:
    """Keep the session from expiring within the block, which may take longer than its ttl."""
    if session.ttl is None:
        yield
        return
    task = asyncio.create_task(_call(store, session))
    try:
        yield
    finally:
        task.cancel()


async def _call(store: MetadataStore, session: Session) -> None:
    """Call the session four times a ttl, until it has none any more or is gone."""
    ttl = session.ttl
    while ttl is not None:
        await asyncio.sleep(ttl / 4)
        try:
            ttl = (await store.session(session.owned_id)).ttl
        except Unavailable:
            continue
        except EraError:
            return  # It is gone, as whoever holds the block will find.


class Expiry:
    """Marks sessions that have expired and ends their sandboxes. Purges those whose time to be restored is over, or of
    which there are more than their owner's quotas allow."""

    def __init__(self, store: MetadataStore, pool: SandboxPool, cluster: Cluster, quotas: Quotas) -> None:
        self._quotas = quotas
        self._store = store
        self._pool = pool
        self._cluster = cluster

    async def sweep(self) -> None:
        """Mark the sessions that have expired by now, and begin to end the sandboxes of all that are gone."""
        for key in await self._store.expire(now()):
            self._pool.release_soon(key)  # a call or a sweep mustn't wait for what another owner's session is doing
        await self._release_gone()

    async def _release_gone(self) -> None:
        """End the sandboxes here of sessions that are gone, whoever has found that."""
        # A session whose id was taken anew the moment it expired was marked then, so `expire` doesn't return its key.
        # One that was deleted through another host of a cluster, or whose deletion was committed without an answer, may
        # have something under way here.
        if keys := self._pool.session_keys():
            for key in set(keys) - set(await self._store.present_sessions(keys)):
                self._pool.release_soon(key)

    async def run(self) -> None:
        """Sweep and purge once a second, for ever; where another host leads, only end sandboxes here."""
        for number in count():
            await asyncio.sleep(_SWEEP_SECONDS)
            try:
                if self._cluster.leads:
                    await self.sweep()
                    await self._store.purge(now())
                    if number % _TRIMMED_EVERY == 0 and self._quotas.bounds_sessions():
                        await self._store.purge_beyond(self._quotas.of_removed)
                else:
                    await self._release_gone()
            except EraError as error:
                log.warning("sessions_not_swept", error=error.message)
            except OSError as error:  # such as EMFILE
                note_outage("sessions_not_swept", error)
