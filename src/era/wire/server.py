"""Answers about the server: health, languages, hosts of a cluster, what an operator is shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, Field

from era import languages
from era.core.cluster.homes import HostRecord
from era.core.models import Finding, JsonObject, SettingInForce, timestamp
from era.languages import Definition


class LimitAnswer(BaseModel):
    name: str = Field(
        description="Of the setting, and of which of its numbers.", examples=["ERA_MEMORY_MB", "ERA_QUOTAS sessions"]
    )
    value: float | None = Field(description="What holds, in the unit of `description`; null: nothing is set.")
    default: float | None = Field(description="What holds where nothing is set.")
    description: str


class FindingAnswer(BaseModel):
    about: str = Field(description="A language or a kind of sandbox.", examples=["python", "bubblewrap"])
    there: bool = Field(description="Whether this machine has it.")
    text: str = Field(examples=["system calls filtered"])
    remedy: str | None = Field(description="How to get what isn't there.")


class ServerAnswer(BaseModel):
    version: str
    at_a_time: dict[str, int] = Field(
        description="How many `runs` may work, and how many `sandboxes` sessions may have."
    )
    limits: list[LimitAnswer]
    findings: list[FindingAnswer]


def server_answer(
    version: str, at_a_time: Mapping[str, int], limits: Iterable[SettingInForce], findings: Iterable[Finding]
) -> dict[str, Any]:
    """What holds and what was found, as `ServerAnswer`."""
    return {
        "version": version,
        "at_a_time": dict(at_a_time),
        "limits": [asdict(limit) for limit in limits],
        "findings": [{**asdict(finding), "remedy": finding.remedy or None} for finding in findings],
    }


class LanguageAnswer(BaseModel):
    name: str = Field(examples=["python"])
    title: str = Field(description="The name as people write it.", examples=["Python"])
    aliases: list[str] = Field(description="Other names that requests may use.", examples=[["py"]])
    version: str | None = Field(description="Version of the runtime here; null without one.", examples=["3.13.5"])
    available: bool
    endings: list[str] = Field(description="Endings of its files' names.", examples=[[".py"]])
    packages: str | None = Field(description="The field of `setup` that installs packages for it.", examples=["pip"])
    contexts: bool = Field(description="Whether this machine has interpreters for it that stay (`context` of a run).")
    reason: str | None = Field(default=None, description="Why it isn't available.")
    hint: str | None = Field(default=None, description="How to make it available.")


class LanguagesAnswer(BaseModel):
    languages: list[LanguageAnswer]


def language_answer(definition: Definition) -> dict[str, Any]:
    """A language with the version that this machine has, or why it has none."""
    answer = {
        "name": definition.name,
        "title": definition.title,
        "aliases": definition.aliases,
        "version": None,
        "available": False,
        "endings": [ending for ending in definition.endings if languages.of_file(ending) == definition.name],
        "packages": definition.packages,
        "contexts": False,
    }
    try:
        runtime = languages.runtime(definition.name)
        return {**answer, "version": runtime.version, "available": True, "contexts": runtime.kernel is not None}
    except languages.Missing as missing:
        return {**answer, "reason": missing.reason, "hint": missing.hint}


class HealthAnswer(BaseModel):
    status: Literal["ok"]
    version: str
    languages: list[str] = Field(description="Those that this machine can run.")
    isolation: dict[str, Any] = Field(description="What sandboxes get here.")
    sandboxes: dict[str, int] = Field(description="How many there are, by use.")


class ReadyAnswer(BaseModel):
    status: Literal["ready"]
    sandboxes: dict[str, int] = Field(
        description="How many sessions may have a sandbox (`places`), have one (`taken`) and wait for one (`waiting`)."
    )


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
