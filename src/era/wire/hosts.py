"""The hosts of a cluster, as answers have them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from era.core.homes import HostRecord
from era.core.models import JsonObject, timestamp


class HostState(BaseModel):
    """What a host says of itself."""

    version: str
    ready: bool = Field(description="Whether it can take runs.")
    reason: str | None = Field(description="Why it can't.")
    sandboxes: dict[str, int] = Field(description="How many there are, by use: as in `GET /health`.")
    live_sessions: int
    processes: int = Field(description="Those of live sessions.")
    moved_away: int = Field(description="Sessions that have moved to hosts with more room since this one was started.")


class ClusterHost(BaseModel):
    id: str
    url: str = Field(description="Where other hosts reach it; empty as long as it doesn't listen.")
    status: Literal["ready", "not_ready", "silent", "dead"] = Field(
        description="`silent`: it has a lease, and doesn't answer. `dead`: its lease was over, or it was stopped."
    )
    leader: bool = Field(description="Whether it does what is done once in the cluster.")
    sessions: int = Field(description="How many are at home there.")
    started_at: str
    heartbeat_at: str = Field(description="The last one, by the database's clock.")
    state: HostState | None = Field(description="What it says of itself; null if it doesn't answer.")


class HostsAnswer(BaseModel):
    hosts: list[ClusterHost] = Field(description="In the order in which they were started.")
    this: str | None = Field(description="The id of the host that answered; null outside of a cluster.")


def host_answer(record: HostRecord, state: JsonObject | None) -> dict[str, Any]:
    """A host and what it said of itself, if it did, as `ClusterHost`."""
    if record.dead:
        status, state = "dead", None
    elif state is None:
        status = "silent"
    else:
        status = "ready" if state["ready"] else "not_ready"
    return {
        "id": record.host.id,
        "url": record.host.url,
        "status": status,
        "leader": record.leads,
        "sessions": record.sessions,
        "started_at": timestamp(record.started_at),
        "heartbeat_at": timestamp(record.heartbeat_at),
        "state": state,
    }
