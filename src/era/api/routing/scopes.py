"""Which scope a call needs, by its method and path.

Everything that isn't named here needs `write`, unless it only reads. So a route that somebody adds and forgets here is
closed to keys with fewer rights, and not open. The calls of the operator need `admin`, which the routes themselves
check too (`operator_only`).

`write` can have code run without `run`: it decides what setups, public URLs and inboxes run.
"""

from __future__ import annotations

import re

from era.core.owners.api_keys import SCOPES, Caller, Scope
from era.errors import Forbidden

_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_OPERATOR = re.compile(r"/api/(keys|owners|server|hosts)(/|$)")
SOCKETS = re.compile(r"/api/sessions/[^/]+/(terminal|processes/[^/]+/attach)")
"""WebSockets, whose request is a GET, and which give input to programs."""

_RUNS = re.compile(
    r"/api/execute|/api/sessions/[^/]+/("
    r"run|stream|terminal|tickets|stop|checkpoint|runs/[^/]+|(processes|contexts)(/.*)?|inbox/deliveries/[^/]+/replay)",
    re.DOTALL,
)
"""Calls that have code run, or end it, and change a session only by what it does."""

_MCP = re.compile(r"/mcp(/|$)")
"""Its tools are calls of this API with the caller's key, each of which is checked for itself."""


def needed(method: str, path: str) -> Scope | None:
    """The scope that a call needs, None where any key will do."""
    if _MCP.match(path):
        return None
    if _OPERATOR.match(path):
        return "admin"
    if SOCKETS.fullmatch(path):
        return "run"
    if method in _READS:
        return "read"
    return "run" if _RUNS.fullmatch(path) else "write"


def check(caller: Caller, method: str, path: str) -> None:
    """Raises Forbidden where the caller's key isn't good for a call."""
    scope = needed(method, path)
    if scope is None or scope in caller.scopes:
        return
    if scope == "admin":
        raise Forbidden(
            "Only this server's operator may see to keys, owners and quotas, or see the server's limits.",
            hint="Call with the key in the server's ERA_API_KEY, or with a key that has the scope 'admin'; start the "
            "server with a key if it has none.",
            code="not_operator",
        )
    has = ", ".join(f"'{each}'" for each in SCOPES if each in caller.scopes)
    raise Forbidden(
        f"This call needs a key with the scope '{scope}' (to {SCOPES[scope]}); this one has {has}.",
        hint="Use another key, or ask the server's operator: PATCH /api/keys/{key_id} changes a key's scopes.",
        code="scope_missing",
    )
