"""The kept output of runs: short output in the run's row, long output as a blob."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from era.core.active_runs import ActiveRuns
from era.core.files.snapshots import BlobStore
from era.core.metadata import MetadataStore
from era.core.models import KeptOutputs, OwnedId, RunRecord
from era.core.program import STREAMS, Stream
from era.core.written import Written
from era.errors import CommitFailed, Conflict, NotFound, Unavailable

INLINE_BYTES = 16 << 10
"""Longer output is a blob: it would make the database large and its pages slow to walk."""


class Outputs:
    """Makes output durable, and reads it."""

    def __init__(self, blobs: BlobStore, kept: int, directory: Path | None = None) -> None:
        """`kept` is for how many of a session's runs output is kept; with 0 none is, unless for an idempotency key.
        `directory` is for temporary files of output that is long."""
        self._blobs = blobs
        self._kept = kept
        self._directory = directory

    def new(self) -> dict[Stream, Written]:
        """What a run is going to write, by stream."""
        return {stream: Written(self._directory) for stream in STREAMS}

    async def keep(self, stdout: Written, stderr: Written, *, always: bool = False) -> KeptOutputs | None:
        """Make both streams durable, ready to be named by a row. None where output isn't kept and not `always` wanted.
        Raises CommitFailed where the disk fails."""
        if not self._kept and not always:
            return None
        long = [written for written in (stdout, stderr) if written.size > INLINE_BYTES]
        try:
            digests = iter(await asyncio.to_thread(self._put, long) if long else ())
        except OSError as error:
            raise CommitFailed(f"the output of this run could not be kept: {error.strerror}") from error
        first = next(digests) if stdout in long else None
        second = next(digests) if stderr in long else None
        return KeptOutputs(
            None if first else await stdout.whole(), None if second else await stderr.whole(), first, second
        )

    async def open(self, kept: KeptOutputs, stream: Stream) -> Written:
        """One stream, to be read and closed. Raises Unavailable where the disk fails."""
        content = kept.stdout if stream == "stdout" else kept.stderr
        if content is not None:
            written = Written()
            await written.append(content)
            return written
        digest = (kept.stdout_digest if stream == "stdout" else kept.stderr_digest) or ""
        try:
            return Written.of_file(await asyncio.to_thread(self._blobs.open_blob, digest))
        except OSError as error:
            raise Unavailable(f"The output could not be read: {error.strerror}.") from error

    def _put(self, long: Sequence[Written]) -> list[str]:
        with self._blobs.batch() as batch:
            return [written.put(batch) for written in long]


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

    async def output(self, session_id: OwnedId, run_id: str, stream: Stream) -> Written:
        """A run's output: what it has written so far, or all that was kept; to be read and closed. Raises NotFound
        where it isn't kept any more, Conflict where the run has ended and its end could not be recorded."""
        run = self._active_runs.get(run_id)
        record, kept = await self._store.run(session_id, run_id)
        if record.status == "running":
            if run is not None and run.session_key == record.session_key:
                return run.written[stream].so_far()
            raise Conflict(
                f"How run '{run_id}' ended is not on record.",
                hint="It could not be written; the next start of the service records it as lost.",
                code="run_under_way",
            )
        if kept is not None:
            return await self._outputs.open(kept, stream)
        if record.status != "lost" and not (record.stdout_bytes or record.stderr_bytes):
            return Written()
        raise NotFound(
            f"The output of run '{run_id}' is not kept.",
            hint="The outputs of a session's newest runs are kept (ERA_OUTPUTS_KEPT), and those of lost runs never.",
            code="output_gone",
        )
