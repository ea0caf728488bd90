"""Routes of a session's contexts. Runs in them are those of runs.py."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from era.api.addresses import base_url
from era.api.context import Answer, SessionId, StrictRoute, UseContext, errors
from era.wire.contexts import (
    ContextAnswer,
    ContextDeletedAnswer,
    ContextsAnswer,
    InterruptedAnswer,
    context_answer,
)

router = APIRouter(prefix="/api/sessions/{session_id}/contexts", tags=["contexts"], route_class=StrictRoute)

Name = Annotated[str, Path(max_length=64, description="The context's name.")]


@router.get("", responses={200: {"model": ContextsAnswer}, **errors(404)})
async def list_contexts(session_id: SessionId, context: UseContext) -> Response:
    """List the contexts that have an interpreter, in the order in which they were made."""
    found = [context_answer(one) for one in await context.contexts.list(session_id)]
    return Answer({"contexts": found, "count": len(found)})


@router.delete("/{name}", responses={200: {"model": ContextDeletedAnswer}, **errors(404)})
async def delete_context(session_id: SessionId, name: Name, context: UseContext) -> Response:
    """End a context and forget it. A run in it ends, too."""
    await context.contexts.delete(session_id, name)
    return Answer({"success": True, "name": name})


@router.post("/{name}/interrupt", responses={200: {"model": InterruptedAnswer}, **errors(404)})
async def interrupt_context(session_id: SessionId, name: Name, context: UseContext) -> Response:
    """Interrupt the cell that is under way in a context, as Ctrl-C does. Variables stay."""
    interrupted = await context.contexts.interrupt(session_id, name)
    return Answer({"success": True, "name": name, "interrupted": interrupted})


@router.post("/{name}/restart", responses={200: {"model": ContextAnswer}, **errors(404, 409)})
async def restart_context(session_id: SessionId, name: Name, request: Request, context: UseContext) -> Response:
    """Give a context a new interpreter, also where its own has ended. A run in it ends, and variables are gone."""
    restarted = await context.contexts.restart(session_id, name, base_url(request, context.settings))
    return Answer(context_answer(restarted))
