"""Sessions: the bodies that make, change and copy one, and how they are shown."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field

from era.core.jsontext import number
from era.core.models import JsonObject, Session, SetupStatus, WantedIsolation, timestamp
from era.core.sessions.expiry import MAX_TTL
from era.core.sessions.sessions import MOST_LABELS, data_view
from era.core.setup import requirements
from era.languages import in_words
from era.wire.base import Body, Egress, EgressAnswer, Isolation, Limits, LimitsAnswer
from era.wire.setup import SetupBody, SetupResult, result_view
from era.wire.versions import MAX_VERSION

SESSION_ID = r"^[A-Za-z0-9_:-]{1,128}$"

_MOST_LABELS: Any = {"maxProperties": MOST_LABELS}
TimeToLive = Annotated[int | None, Field(ge=1, le=MAX_TTL)]
_CommandPart = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]
Service = Annotated[
    _CommandPart | Annotated[list[_CommandPart], Field(min_length=1, max_length=64), FailFast()] | None,
    Field(description="The command that serves the public URLs: a shell line, or a program and its arguments."),
]


class CreateSession(Body):
    language: str = Field(description=f"{in_words()}, or an alias.", examples=["python"])
    session_id: str | None = Field(None, pattern=SESSION_ID, description="Left out: the server chooses one.")
    persistent: bool = Field(True, description="Whether files are kept between runs. Data always is.")
    data: dict[str, Any] = Field(default_factory=dict, description="The state; `.session_data.json` in the sandbox.")
    metadata: dict[str, Any] = Field(
        default_factory=dict, description="Labels; programs don't see them.", json_schema_extra=_MOST_LABELS
    )
    setup: SetupBody | None = Field(None, description="Packages to install, commands to run, variables of every run.")
    allowInternetAccess: bool = Field(True, description="Whether programs may connect to the internet.")
    allowPublicAccess: bool = Field(True, description="Whether anybody may call the session's public URL.")
    default_timeout: float = Field(30.0, gt=0, description="Timeout of runs that name none, in seconds.")
    ttl: TimeToLive = Field(None, description="Seconds without a call after which it expires; null: never.")
    limits: Limits = None
    isolation: Isolation = "auto"
    egress: Egress = None
    service: Service = None
    storage: bool = Field(True, description="Whether programs may use the storage.")
    record_code: bool = Field(True, description="Whether records of its runs keep the code or command that ran.")


class ChangeSession(Body):
    """Fields left out stay as they are."""

    default_timeout: float | None = Field(None, gt=0)
    allowInternetAccess: bool | None = None
    allowPublicAccess: bool | None = None
    metadata: dict[str, Any] | None = Field(None, json_schema_extra=_MOST_LABELS)
    data: dict[str, Any] | None = Field(None, description="Replaces the state, between runs.")
    ttl: TimeToLive = Field(None, description="Seconds without a call after which it expires; null: never.")
    limits: Limits = None
    isolation: Isolation | None = None
    egress: Egress = None
    service: Service = None
    storage: bool | None = Field(None, description="Whether programs may use the storage, from the next run on.")
    record_code: bool | None = Field(
        None, description="Whether records of its runs keep what ran, from the next run on. Earlier records stay."
    )
    setup: SetupBody | None = Field(None, description="Replaces the setup, between runs; null removes it.")


class DuplicateBody(Body):
    id: str | None = Field(None, pattern=SESSION_ID, description="The new session's; left out: the server chooses one.")
    new_id: str | None = Field(None, pattern=SESSION_ID, description="Another name of `id`.")
    data: dict[str, Any] | None = Field(None, description="Replaces the state.")
    from_version: int | None = Field(None, ge=1, le=MAX_VERSION, description="Left out: the current one.")


class SessionAnswer(BaseModel):
    id: str = Field(examples=["demo"])
    session_id: str = Field(description="The same as `id`.", examples=["demo"])
    created_at: str = Field(description="RFC 3339, in UTC.", examples=["2026-01-31T12:00:00.000Z"])
    last_run_at: str = Field(description="Empty before the first run.", examples=["2026-01-31T12:00:01.500Z"])
    language: str = Field(examples=["python"])
    persistent: bool
    file_count: int
    total_size_bytes: int
    metadata: dict[str, Any]
    data: dict[str, Any]
    setup: dict[str, Any] | None
    allowInternetAccess: bool
    allowPublicAccess: bool
    default_timeout: float
    version: int
    ttl: int | None
    expires_at: str | None
    limits: LimitsAnswer
    isolation: WantedIsolation
    egress: EgressAnswer
    service: str | list[str] | None
    storage: bool
    record_code: bool = Field(description="Whether records of its runs keep the code or command that ran.")
    status: Literal["idle", "running", "live", "expired", "deleted"]
    processes: int = Field(description="How many processes run beside runs.")
    files: list[dict[str, Any]] | None = None
    setup_status: SetupStatus | None = Field(None, description="Only with a setup.")
    setup_result: SetupResult | None = Field(None, description="The result, once the setup has ended.")


class ListedSession(SessionAnswer):
    """The fields that the list was asked for; those of a session where it was asked for none."""

    model_config = ConfigDict(json_schema_extra=lambda schema: schema.pop("required", None))


class SessionsAnswer(BaseModel):
    sessions: list[ListedSession]
    count: int
    next_cursor: str | None


class ChangedAnswer(BaseModel):
    success: bool
    id: str
    session: SessionAnswer
    metadata: SessionAnswer = Field(description="The same as `session`, under an older name.")
    updated_at: str


class DeletedAnswer(BaseModel):
    success: bool
    id: str
    deleted_at: str


class DeletedAllAnswer(BaseModel):
    success: bool
    deleted_count: int
    deleted_sessions: list[str]
    deleted_at: str


class HostAnswer(BaseModel):
    url: str = Field(description="By which anybody may call the session.")
    base_url: str
    session_id: str
    port: int
    label: str = Field(description="Of the session's site, in its host name behind the port.")
    site_url: str = Field(description="The same under a host name of the session's own, as a site of its own.")


def session_answer(session: Session, status: str, limits: JsonObject, processes: int = 0) -> dict[str, Any]:
    """The session object.

    `status` is `running` while a run is under way, else `live` where there are or were processes just now, else `idle`;
    a session that has expired or was deleted shows that instead. `limits` are those in force, with the server's
    defaults filled in. `processes` are how many run beside runs.
    """
    return {
        "id": session.id,
        "session_id": session.id,
        "created_at": timestamp(session.created_at),
        "last_run_at": timestamp(session.last_run_at),
        "language": session.language,
        "persistent": session.persistent,
        "file_count": session.snapshot.file_count,
        "total_size_bytes": session.snapshot.total_bytes,
        "metadata": session.metadata,
        "data": data_view(json.loads(session.data), session.stored),
        "setup": requirements.setup_view(session.setup),
        "allowInternetAccess": session.allow_internet,
        "allowPublicAccess": session.allow_public,
        "default_timeout": number(session.default_timeout),
        "version": session.version,
        "ttl": session.ttl,
        "expires_at": None if session.expires_at is None else timestamp(session.expires_at),
        "limits": limits,
        "isolation": session.isolation,
        "egress": {"allow": session.egress.get("allow", [])},
        "service": session.service,
        "storage": session.storage,
        "record_code": session.record_code,
        "status": session.removal or status,
        "processes": 0 if session.removal else processes,
        **({} if session.setup is None else _setup_answer(session)),
    }


def _setup_answer(session: Session) -> dict[str, Any]:
    return {"setup_status": session.setup_status, "setup_result": result_view(session)}
