"""The kept output of runs: short output in the run's row, long output as a blob."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import closing, suppress
from pathlib import Path

from era.core import jsontext
from era.core.concurrency.event_log import Gap
from era.core.concurrency.tasks import Threads
from era.core.execution.active_runs import ActiveRun, ActiveRuns
from era.core.execution.run_messages import RunResult, pieces_of, result_of
from era.core.execution.spooled_output import SpooledOutput
from era.core.execution.transcript import Piece, Transcript
from era.core.metadata import MetadataStore, RunFilter
from era.core.models import Claim, JsonObject, KeptOutputs, OwnedId, RunRecord
from era.core.program import STREAMS, Stream
from era.core.trees.blob_store import BlobStore
from era.errors import CommitFailed, Conflict, EraError, NotFound, RunLost, Unavailable

INLINE_BYTES = 16 << 10
"""Longer output is a blob: it would make the database large and its pages slow to walk."""

_ENCODER = json.JSONEncoder(ensure_ascii=False)
_THREADS = 8
"""For blobs, of their own: a bucket that doesn't answer may keep them for most of a minute. Those of the event loop are
for what everybody needs, such as watching the memory of runs."""


class Outputs:
    """Makes output durable, and reads it."""

    def __init__(self, blobs: BlobStore, kept: int, directory: Path | None = None) -> None:
        """`kept` is for how many of a session's runs output is kept; with 0 none is, unless for an idempotency key.
        `directory` is for temporary files of output that is long."""
        self._threads = Threads(_THREADS, "era-outputs")
        self._blobs = blobs
        self._kept = kept
        self._directory = directory

    async def close(self) -> None:
        """Wait for calls under way."""
        await self._threads.close()

    def new(self) -> Transcript:
        """What a run is going to write."""
        return Transcript(self._directory)

    async def keep(
        self, transcript: Transcript, cell: JsonObject | None = None, *, always: bool = False
    ) -> KeptOutputs | None:
        """End a run's output and make it durable, and what a cell answered, ready to be named by a row. None where
        output isn't kept and not `always` wanted. Raises CommitFailed where the disk fails."""
        try:
            await transcript.end()
            if not self._kept and not always:
                return None
            parts = [transcript.stdout, transcript.stderr, transcript.order]
            told = SpooledOutput(self._directory)
            if cell is not None:
                await told.append(await jsontext.aside(_encoded, cell))
                parts.append(told)
            long = [part for part in parts if part.size > INLINE_BYTES]
            digests = dict(zip(long, await self._threads(self._put, long), strict=True)) if long else {}
            short = {part: await part.whole() for part in parts if part not in digests}
        except OSError as error:
            raise CommitFailed(f"the output of this run could not be kept: {error.strerror}") from error
        return KeptOutputs(
            short.get(transcript.stdout),
            short.get(transcript.stderr),
            digests.get(transcript.stdout),
            digests.get(transcript.stderr),
            short.get(transcript.order),
            digests.get(transcript.order),
            short.get(told),
            digests.get(told),
            sum(part.size for part in long),
        )

    async def open(self, kept: KeptOutputs, stream: Stream) -> SpooledOutput:
        """One stream, to be read and closed. Raises Unavailable where the disk fails."""
        if stream == "stdout":
            return await self._open(kept.stdout, kept.stdout_digest)
        return await self._open(kept.stderr, kept.stderr_digest)

    async def transcript(self, kept: KeptOutputs, count: int | None) -> Transcript:
        """All of it, to be read and closed. `count` is the record's `pieces`. Raises Unavailable where the disk
        fails."""
        stdout, stderr = [await self.open(kept, stream) for stream in STREAMS]
        has_order = kept.piece_order is not None or kept.piece_order_digest is not None
        order = await self._open(kept.piece_order, kept.piece_order_digest) if has_order else None
        return await Transcript.of(stdout, stderr, order, count)

    async def cell(self, kept: KeptOutputs | None) -> JsonObject | None:
        """What a run in a context answered besides; None for other runs, and where it isn't kept. Raises Unavailable
        where the disk fails."""
        if kept is None or (kept.cell is None and kept.cell_digest is None):
            return None
        with closing(await self._open(kept.cell, kept.cell_digest)) as told:
            return await jsontext.stored((await told.whole()).decode())

    async def _open(self, content: bytes | None, digest: str | None) -> SpooledOutput:
        if content is not None:
            written = SpooledOutput()
            await written.append(content)
            return written
        try:
            return SpooledOutput.of_file(await self._threads(self._blobs.open_blob, digest or ""))
        except OSError as error:
            raise Unavailable(f"The output could not be read: {error.strerror}.") from error

    def _put(self, long: Sequence[SpooledOutput]) -> list[str]:
        with self._blobs.batch() as batch:
            return [written.put(batch) for written in long]


def _encoded(cell: JsonObject) -> bytes:
    """What a cell answered, as it is kept: up to 4 MiB of results."""
    return jsontext.encoded(_ENCODER, cell).encode()


class History:
    """The records of a session's runs, and what they wrote."""

    def __init__(self, store: MetadataStore, outputs: Outputs, active_runs: ActiveRuns) -> None:
        self._store = store
        self._active_runs = active_runs
        self._outputs = outputs

    async def list(self, session_id: OwnedId, *, limit: int, before: int | None) -> Sequence[RunRecord]:
        """Newest first, those before the one with the key `before`."""
        session = await self._store.session(session_id)
        return await self._store.runs(session.key, limit, before)

    async def of_key(self, session_id: OwnedId, key: str) -> Sequence[RunRecord]:
        """The run that has begun with an idempotency key, if there is one."""
        first = await self._store.find_claim(session_id, Claim("run", key, "", ""))
        return [] if first is None or first.run is None else [first.run]

    async def of_owner(self, which: RunFilter) -> Sequence[tuple[str, RunRecord]]:
        """The runs of all of an owner's sessions, newest first, each with its session's id. Raises NotFound where a
        session is named that isn't there."""
        if which.session_id is not None:
            await self._store.session(OwnedId(which.owner, which.session_id))
        return await self._store.runs_of_owner(which)

    async def get(self, session_id: OwnedId, run_id: str) -> RunRecord:
        """Raises NotFound."""
        record, _ = await self._store.run(session_id, run_id)
        return record

    async def get_with_cell(self, session_id: OwnedId, run_id: str) -> tuple[RunRecord, JsonObject | None]:
        """The same, and what a run in a context answered besides, if it was one and that is kept."""
        record, kept = await self._store.run(session_id, run_id)
        return record, await self._outputs.cell(kept)

    async def output(self, session_id: OwnedId, run_id: str, stream: Stream) -> SpooledOutput:
        """A run's output: what it has written so far, or all that was kept; to be read and closed. Raises NotFound
        where it isn't kept any more, Conflict where the run has ended and its end could not be recorded."""
        run, record, kept = await self._find(session_id, run_id)
        if run is not None:
            return run.transcript[stream].so_far()
        if kept is not None:
            return await self._outputs.open(kept, stream)
        if record.status != "lost" and not (record.stdout_bytes or record.stderr_bytes):
            return SpooledOutput()
        raise NotFound(
            f"The output of run '{run_id}' is not kept.",
            hint="The outputs of a session's newest runs are kept (ERA_OUTPUTS_KEPT), 2 GiB at most, and those of "
            "lost runs never.",
            code="output_gone",
        )

    async def events(self, session_id: OwnedId, run_id: str, after: int) -> AsyncGenerator[Piece | Gap | RunResult]:
        """Follow a run from behind the piece with the number `after`: what it wrote, as it writes it if it is under
        way, then its result, whose number is the next. A number beyond that gets the result: only who has had it isn't
        told of it again. Raises NotFound or Conflict as `output` does; reading on, an
        EraError where the run has no result."""
        run, record, kept = await self._find(session_id, run_id)
        transcript = None
        if run is not None:
            transcript = run.transcript.share()
        elif kept is not None:
            transcript = await self._outputs.transcript(kept, record.pieces)
        return self._follow(session_id, run, record, kept, transcript, after)

    async def _follow(
        self,
        session_id: OwnedId,
        run: ActiveRun | None,
        record: RunRecord,
        kept: KeptOutputs | None,
        transcript: Transcript | None,
        after: int,
    ) -> AsyncGenerator[Piece | Gap | RunResult]:
        if transcript is not None:
            async for piece in transcript.pieces(after):
                yield piece
        elif after < pieces_of(record):
            yield Gap(after + 1, pieces_of(record))
        if run is not None:
            await run.ended.wait()
            record, kept = await self._store.run(session_id, record.id)
        if record.exit_code is None:
            problem = f"Run '{record.id}' has no result: {record.reason or 'its end is not on record'}."
            hint = "Nothing of it is kept but its record."
            if record.status in ("lost", "running"):
                raise RunLost(problem, hint=hint)
            raise EraError(problem, hint=hint, code="no_result")
        if after != pieces_of(record) + 1:
            yield await self._result(session_id, record, await self._outputs.cell(kept))

    async def _result(self, session_id: OwnedId, record: RunRecord, cell: JsonObject | None) -> RunResult:
        """What a run was answered, as far as that is kept: the data of a version that is gone isn't."""
        session = await self._store.session(session_id)
        data = None
        with suppress(NotFound):
            kept = (await self._store.version(session_id, record.version)).data if record.version else "{}"
            data = await jsontext.stored(kept)
        return result_of(session, record, data, cell=cell)

    async def _find(self, session_id: OwnedId, run_id: str) -> tuple[ActiveRun | None, RunRecord, KeptOutputs | None]:
        """A run if it is under way, its record, and what is kept of its output."""
        run = self._active_runs.get(run_id)
        if run is not None:
            run.transcript.share()  # it may be closed before its record has been read
        record, kept = await self._store.run(session_id, run_id)
        if record.status != "running":
            return None, record, kept
        if run is None or run.session_key != record.session_key:
            raise Conflict(
                f"How run '{run_id}' ended is not on record.",
                hint="It could not be written; the next start of the service records it as lost.",
                code="run_under_way",
            )
        return run, record, kept
