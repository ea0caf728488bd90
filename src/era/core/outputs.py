"""The kept output of runs: short output in the run's row, long output as a blob."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

from era.core.active_runs import ActiveRuns
from era.core.files.snapshots import BlobStore
from era.core.metadata import MetadataStore
from era.core.models import KeptOutputs, OwnedId, RunRecord
from era.errors import CommitFailed, Conflict, NotFound, Unavailable

type Stream = Literal["stdout", "stderr"]
STREAMS: tuple[Stream, ...] = ("stdout", "stderr")

INLINE_BYTES = 16 << 10
"""Longer output is a blob: it would make the database large and its pages slow to walk."""


class Outputs:
    """Makes output durable, and reads it."""

    def __init__(self, blobs: BlobStore, kept: int) -> None:
        """`kept` is for how many of a session's runs output is kept; with 0 none is, unless for an idempotency key."""
        self._blobs = blobs
        self._kept = kept

    async def keep(self, stdout: bytes, stderr: bytes, *, always: bool = False) -> KeptOutputs | None:
        """Make both streams durable, ready to be named by a row. None where output isn't kept and not `always` wanted.
        Raises CommitFailed where the disk fails."""
        if not self._kept and not always:
            return None
        long = [content for content in (stdout, stderr) if len(content) > INLINE_BYTES]
        if not long:
            return KeptOutputs(stdout, stderr)
        try:
            digests = iter(await asyncio.to_thread(self._put, long))
        except OSError as error:
            raise CommitFailed(f"the output of this run could not be kept: {error.strerror}") from error
        first = next(digests) if len(stdout) > INLINE_BYTES else None
        second = next(digests) if len(stderr) > INLINE_BYTES else None
        return KeptOutputs(None if first else stdout, None if second else stderr, first, second)

    async def read(self, kept: KeptOutputs, stream: Stream) -> bytes:
        """All of one stream. Raises Unavailable where the disk fails."""
        content = kept.stdout if stream == "stdout" else kept.stderr
        if content is not None:
            return content
        digest = (kept.stdout_digest if stream == "stdout" else kept.stderr_digest) or ""
        try:
            return await asyncio.to_thread(self._blobs.get, digest)
        except OSError as error:
            raise Unavailable(f"The output could not be read: {error.strerror}.") from error

    def _put(self, contents: Sequence[bytes]) -> list[str]:
        with self._blobs.batch() as batch:
            return [batch.put(content) for content in contents]


class History:
    """The records of a session's runs."""

    def __init__(self, store: MetadataStore, outputs: Outputs, active_runs: ActiveRuns) -> None:
        self._store = store
        self._active_runs = active_runs
        self._outputs = outputs

    async def list(self, session_id: OwnedId, *, limit: int, before: int | None) -> Sequence[RunRecord]:
        """Newest first, those before the one with the key `before`."""
        session = await self._store.session(session_id)
        return await self._store.runs(session.key, limit, before)

    async def get(self, session_id: OwnedId, run_id: str) -> RunRecord:
        """Raises NotFound."""
        record, _ = await self._store.run(session_id, run_id)
        return record

    async def output(self, session_id: OwnedId, run_id: str, stream: Stream) -> bytes:
        """A run's output: what it has written so far, or all that was kept. Raises NotFound where it isn't kept any
        more, Conflict where the run has ended and its end could not be recorded."""
        run = self._active_runs.get(run_id)
        record, kept = await self._store.run(session_id, run_id)
        if record.status == "running":
            if run is not None and run.session_key == record.session_key:
                return b"".join(run.written[stream])
            raise Conflict(
                f"How run '{run_id}' ended is not on record.",
                hint="It could not be written; the next start of the service records it as lost.",
                code="run_under_way",
            )
        if kept is not None:
            return await self._outputs.read(kept, stream)
        if record.status != "lost" and not (record.stdout_bytes or record.stderr_bytes):
            return b""
        raise NotFound(
            f"The output of run '{run_id}' is not kept.",
            hint="The outputs of a session's newest runs are kept (ERA_OUTPUTS_KEPT), and those of lost runs never.",
            code="output_gone",
        )
