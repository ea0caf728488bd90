"""The route of the audit log."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from era.api.context import Cursor, Limit, StrictRoute, UseContext, caller_of, cursor_of, errors, key_of, moment
from era.api.streaming import listing_response, page_pieces
from era.core.api_keys import OWNER
from era.core.audit import Action, AuditFilter
from era.errors import Forbidden
from era.wire.audit import AuditAnswer, audit_answer

router = APIRouter(prefix="/api/audit", tags=["audit"], route_class=StrictRoute)


@router.get("", responses={200: {"model": AuditAnswer}, **errors()})
async def list_audit(
    request: Request,
    context: UseContext,
    action: Annotated[Action | None, Query(description="Only this.")] = None,
    target: Annotated[str | None, Query(max_length=128, description="Only what was done to this.")] = None,
    owner: Annotated[
        str | None,
        Query(pattern=OWNER, description="Only what this owner did. Others than the operator see their own."),
    ] = None,
    since: Annotated[str | None, Query(description="Only from then on (RFC 3339).")] = None,
    until: Annotated[str | None, Query(description="Only before then (RFC 3339).")] = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Response:
    """List what was done, newest first: by the caller's owner, or with the operator's key by all."""
    caller = caller_of(request)
    if not caller.is_operator and owner not in (None, caller.owner):
        raise Forbidden(
            "Only this server's operator may see what other owners did.",
            hint="Leave 'owner' out.",
            code="not_operator",
        )
    entries = await context.audit.list(
        AuditFilter(
            limit + 1,  # one more tells whether there is a next page
            owner if caller.is_operator else caller.owner,
            action,
            target,
            None if since is None else moment("since", since),
            None if until is None else moment("until", until),
            key_of(cursor) if cursor else None,
        )
    )
    page = entries[:limit]
    following = cursor_of(page[-1].key) if len(entries) > limit else None
    rest = {"count": len(page), "next_cursor": following}
    return await listing_response(page_pieces("entries", page, audit_answer, rest))
