"""The bound of a session's history: how much its kept versions may hold, and which of them go beyond that.

Theory of operation. Versions share content, so what they hold together can only be counted by reading the lists of all
their directories. No commit should pay for that. So a session's row has an upper bound of what is held: each commit
adds what it has newly stored, and versions that go take nothing off. Only when that sum is over the limit is it counted
what is really held, before the commit and on a thread; the commit then drops the oldest versions without a name, and of
those checkpoints first.

Where anything must go, so much goes that an eighth of the limit is free. And the row never says after a count that
less were free. So an eighth of the limit must be stored anew before it is counted again, and a session holds at most
its limit, or what can't be dropped, and an eighth of the limit besides.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from era.core.files.snapshots import Snapshots
from era.core.limits import Rules
from era.core.metadata import MetadataStore
from era.core.models import KeptVersion, Session, Snapshot, Trim
from era.errors import TooLarge, Unavailable

log = structlog.get_logger()

DISKS = 4
"""Where the server sets no limit, a session's history may hold so many times what its working directory may."""

MAX_NAMED = 256
"""How many versions of a session may have a name."""


class HistoryBound:
    """Keeps the histories of sessions within their limit."""

    def __init__(self, store: MetadataStore, snapshots: Snapshots, rules: Rules, most_bytes: int = 0) -> None:
        """`most_bytes` is the limit of each session; 0 stands for `DISKS` times its own disk space."""
        self._store = store
        self._snapshots = snapshots
        self._rules = rules
        self._most_bytes = most_bytes

    def most(self, session: Session) -> int:
        """How many bytes the session's versions may hold."""
        return self._most_bytes or DISKS * self._rules.granted(session.limits).disk_bytes

    async def trim(self, session: Session, snapshot: Snapshot | None) -> Trim | None:
        """What a commit of this snapshot must drop, None where nothing has to be counted. Called in the session's turn,
        with the session as it is before the commit."""
        if snapshot is None or snapshot.root in (None, session.snapshot.root):
            return None
        most = self.most(session)
        if session.history_bytes is not None and session.history_bytes + snapshot.stored_bytes <= most:
            return None
        try:
            return await self._counted(session, snapshot.root)
        except Unavailable as error:
            # The commit can do without: the next one counts again.
            log.warning("history_not_counted", session=session.key, error=error.message)
            return None

    async def check_names(self, session: Session, named: Sequence[KeptVersion]) -> None:
        """Raises TooLarge where these versions can't all have a name, Unavailable where the disk fails."""
        if len(named) > MAX_NAMED:
            raise TooLarge(
                f"Session '{session.id}' has {MAX_NAMED} named versions, and can't have more.",
                hint="DELETE /api/sessions/{id}/versions/{n}/name takes a version its name.",
            )
        most = self.most(session)
        held = await self._snapshots.held_bytes(_roots(named), most, session_id=session.owned_id)
        if held and held[-1] > most:
            raise TooLarge(
                f"The named versions of session '{session.id}' would hold over {most} bytes, which is the limit of its "
                "history.",
                hint="Take another version its name, or raise the server's ERA_HISTORY_MB or the session's disk_mb.",
            )

    async def not_imported(self, session: Session, older: Sequence[KeptVersion]) -> Sequence[int]:
        """Which of these versions must be left out of a session that is imported with them, and with the version in
        force besides. Raises as check_names does."""
        await self.check_names(session, [version for version in older if version.named])
        root = session.snapshot.root or next(iter(_roots(older)), None)
        if root is None:
            return ()
        return (await self._trimmed(session, older, root)).drop

    async def _counted(self, session: Session, root: str) -> Trim:
        """What a commit of the snapshot `root` must drop. Raises Unavailable where the disk fails."""
        return await self._trimmed(session, await self._store.kept_versions(session.key), root)

    async def _trimmed(self, session: Session, kept: Sequence[KeptVersion], root: str) -> Trim:
        """Which of these must go, so that the others and the snapshot `root` hold no more than the session may."""
        most = self.most(session)
        unnamed = sorted(
            (version for version in kept if not version.named), key=lambda version: (version.is_checkpoint, -version.n)
        )
        staying = [root, *_roots([version for version in kept if version.named])]
        totals = await self._snapshots.held_bytes(
            [*staying, *(version.root or root for version in unnamed)],
            most,
            at_least=len(staying),
            session_id=session.owned_id,
        )
        room = most - most // 8
        # What all that stay hold, then these and the newest without a name, these and the newest two, and so on.
        # Checkpoints come last: they go first.
        stay, *others = totals[len(staying) - 1 :]
        if len(others) == len(unnamed) and totals[-1] <= most:
            return Trim((), min(totals[-1], room))
        count = sum(total <= room for total in others)
        return Trim([version.n for version in unnamed[count:]], min([stay, *others][count], room))


def _roots(versions: Sequence[KeptVersion]) -> list[str]:
    """The roots of those that hold anything."""
    return [version.root for version in versions if version.root is not None]
