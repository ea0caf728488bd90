"""Routes of a session's versions: list and compare them, roll back to one, or make a new session of one."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response

from era.api.protocol.answers import Answer, json_bytes
from era.api.routing.context import (
    Cursor,
    IdempotencyKey,
    Include,
    Limit,
    Number,
    SessionId,
    StrictRoute,
    UseContext,
    claim_of,
    errors,
    key_of,
    made_answer,
    session_view,
)
from era.api.routing.streaming import check_file_count, in_one_list, listing_response, paged_response, with_files
from era.core.sessions.sessions import data_of
from era.core.sessions.versions import Diff
from era.core.trees.diffs import KINDS
from era.errors import BadRequest
from era.wire.sessions import DuplicateBody, SessionAnswer
from era.wire.versions import (
    DiffAnswer,
    NameBody,
    NameDeletedAnswer,
    RollbackBody,
    VersionAnswer,
    VersionHeader,
    VersionsAnswer,
    data_changes_answer,
    file_changes_answer,
    version_answer,
)

router = APIRouter(prefix="/api/sessions/{session_id}", tags=["versions"], route_class=StrictRoute)


@router.get("/versions", responses={200: {"model": VersionsAnswer}, **errors(404)})
async def list_versions(
    session_id: SessionId, context: UseContext, limit: Limit = 100, cursor: Cursor = None
) -> Response:
    """List the versions that are kept, newest first."""
    versions = await context.versions.list(session_id, limit=limit + 1, before=key_of(cursor))
    return await paged_response("versions", versions, limit, version_answer, lambda version: version.n)


@router.get("/versions/{number}", responses={200: {"model": VersionAnswer}, **errors(404, 413)})
async def get_version(session_id: SessionId, number: Number, context: UseContext, include: Include = None) -> Response:
    """Show a version with its data."""
    content = await context.versions.get(session_id, number)
    answer = version_answer(content.version) | {"data": data_of(content)}
    if include == "files":
        check_file_count(content.version.snapshot, "/api/sessions/{id}/versions/{number}/files")
        return await listing_response(with_files(answer, context.list_snapshot(content.version.snapshot, session_id)))
    return Answer(answer)


@router.get("/versions/{number}/diff", responses={200: {"model": DiffAnswer}, **errors(404)})
async def diff_version(session_id: SessionId, number: Number, context: UseContext) -> Response:
    """Show what a version changed in data and files, compared with the one before it."""
    return await listing_response(_diff(await context.versions.diff(session_id, number)))


async def _diff(diff: Diff) -> AsyncIterator[bytes]:
    """The pieces of the answer that shows a diff."""
    before = json_bytes({"version": diff.n, "data": data_changes_answer(diff.data)})[:-1] + b',"files":{'
    for kind in KINDS:
        yield before + b'"%b":[' % kind.encode()
        async for piece in in_one_list(file_changes_answer(kind, page) async for page in diff.files(kind)):
            yield piece
        before = b"],"
    yield b"]}}"


@router.put("/versions/{number}/name", responses={200: {"model": VersionHeader}, **errors(404, 409, 413)})
async def name_version(session_id: SessionId, number: Number, body: NameBody, context: UseContext) -> Response:
    """Name a version, or rename it. It is kept for as long as it has a name."""
    return Answer(version_answer(await context.versions.name(session_id, number, body.name)))


@router.delete("/versions/{number}/name", responses={200: {"model": NameDeletedAnswer}, **errors(404)})
async def clear_name(session_id: SessionId, number: Number, context: UseContext) -> Response:
    """Take a version its name. If it was kept for that only, it goes."""
    await context.versions.clear_name(session_id, number)
    return Answer({"success": True, "version": number})


@router.post("/rollback", responses={200: {"model": SessionAnswer}, **errors(404, 409, 429)})
async def rollback(session_id: SessionId, body: RollbackBody, context: UseContext) -> Response:
    """Make a new version with the content of an old one. Waits for the run under way. While processes or contexts run
    it is refused, unless `stop` says to end them."""
    if body.stop:
        await context.store.version(session_id, body.version)  # nothing is ended for a version that isn't kept
        await context.live_sessions.put_away(session_id)
    else:
        await context.live_sessions.put_away_if_ended(session_id)
    return Answer(session_view(await context.versions.rollback(session_id, body.version), context))


@router.post("/duplicate", status_code=201, responses={201: {"model": SessionAnswer}, **errors(404, 409, 413, 429)})
async def duplicate(
    session_id: SessionId,
    request: Request,
    context: UseContext,
    key: IdempotencyKey,
    body: DuplicateBody | None = None,
) -> Response:
    """Make a new session with the content and settings of this one. No file is copied."""
    copy = body or DuplicateBody.model_validate({})
    if copy.id is not None and copy.new_id is not None and copy.id != copy.new_id:
        raise BadRequest("'id' and 'new_id' name two different sessions.", hint="Send one of them.")
    made = await context.versions.duplicate(
        session_id,
        new_id=copy.id or copy.new_id,
        data=copy.data,
        from_version=copy.from_version,
        claim=await claim_of(context, "duplicate", key, copy),
    )
    return await made_answer(made, request, context, copy_of=session_id.id)
