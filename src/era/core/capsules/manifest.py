"""The values of capsule.json: models of the session, its versions and its runs, which check what others have written.

A field of another type, an unknown one or a missing one makes the capsule a bad one. Fields that older capsules lack
have the value here that they stand for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from era import languages
from era.core import jsontext
from era.core.allowlist import can_be_egress
from era.core.execution.run_messages import MAX_RECORDED_BYTES
from era.core.limits import can_be_limits
from era.core.models import Cause, JsonObject, RunRecord, Session, Status, WantedIsolation, can_be_service
from era.core.sessions.expiry import MAX_TTL
from era.core.sessions.versions import NAME
from era.core.setup import package_sets, requirements
from era.core.trees.diffs import MOST, TYPES
from era.errors import BadRequest, TooLarge

MAX_OBJECTS = 1_000_000
"""Bound of a capsule's objects, for exports and imports alike."""

_HINT = "Export the session once more; docs/capsule.md tells what a capsule holds."


def bad_capsule(problem: str) -> BadRequest:
    """The error for a capsule that can't be accepted. `problem` completes the sentence "The capsule …"."""
    return BadRequest(f"The capsule {problem}.", hint=_HINT, code="bad_capsule")


def too_large(problem: str) -> TooLarge:
    """The error for a capsule beyond a bound. `problem` completes the sentence "The capsule …"."""
    return TooLarge(f"The capsule {problem}.", hint="Leave history out of it (?versions=current), or remove files.")


FORMAT = 1
MAX_ENFORCED = 64 << 10
"""Characters of each of a run's JSON objects."""

MAX_MICROS = 253_402_300_799_000_000
"""The last second of the year 9999 in microseconds since 1970, the last that RFC 3339 can express."""

_MAX_NUMBER = (1 << 53) - 1  # the largest integer that every JSON reader can represent
_MAX_INVOCATION = 6 * MAX_RECORDED_BYTES + (64 << 10)
"""Characters of a run's `invocation` as JSON, in which a character may be escaped, and each word has its quotes."""

_UNKNOWN_FIELD = "unknown_field"


class Values(BaseModel):
    """The base of the models: types as in JSON, no unknown fields, other names only by their alias."""

    model_config = ConfigDict(strict=True, frozen=True)

    @classmethod
    def read(cls, value: Any, where: str) -> Self:
        """Read an object. Raises BadRequest, which names the first field that is wrong.

        `where` says what the object is, with an article.
        """
        if not isinstance(value, dict):
            raise bad_capsule(f"has {where} that is no object")
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if not first["loc"]:
            raise bad_capsule(f"has {where} with a field '{first['msg']}' that this server doesn't know")
        name = first["loc"][0]
        if first["type"] == "missing" and len(first["loc"]) == 1:
            raise bad_capsule(f"has {where} without '{name}'")
        raise bad_capsule(f"has {where} whose '{name}' can't be right")

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, value: Any) -> Any:
        """Refuse unknown fields with one error, however many there are."""
        if isinstance(value, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            for name in value:
                if name not in known:
                    raise PydanticCustomError(_UNKNOWN_FIELD, "{name}", {"name": name[:40]})
        return value


def _fits(check: Callable[[Any], Any]) -> AfterValidator:
    """Refuse values for which `check` returns nothing true."""

    def checked(value: Any) -> Any:
        if not check(value):
            raise ValueError("can't be right")
        return value

    return AfterValidator(checked)


def _fits_or_empty(model: type[Values]) -> AfterValidator:
    """Refuse values other than `{}` that aren't as a model says."""
    return _fits(lambda value: value == {} or model.model_validate(value))


type _Id = Annotated[str, _fits(re.compile("[A-Za-z0-9_:-]{1,128}").fullmatch)]
type _Digest = Annotated[str, _fits(re.compile("[0-9a-f]{64}").fullmatch)]
type _Time = Annotated[int, Field(ge=0, le=MAX_MICROS)]
type _Count = Annotated[int, Field(ge=0, le=_MAX_NUMBER)]
type _VersionNumber = Annotated[int, Field(ge=1, le=_MAX_NUMBER)]
type _Int32 = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]
type _Text = Annotated[str, Field(max_length=64 << 10)]
type _Word = Annotated[str, Field(max_length=MAX_RECORDED_BYTES)]


class CodeValues(Values):
    """Stored code."""

    code: str
    description: str | None
    updated_at: _Time


class SessionValues(Values):
    """A session's settings, labels and stored code."""

    id: _Id
    language: Annotated[str, _fits(languages.LANGUAGES.__contains__)]
    persistent: bool
    metadata: JsonObject
    allow_internet: bool = Field(alias="allowInternetAccess")
    allow_public: bool = Field(alias="allowPublicAccess")
    default_timeout: Annotated[float, Field(gt=0, le=1e9)]
    ttl: Annotated[int, Field(ge=1, le=MAX_TTL)] | None
    limits: Annotated[Any, _fits(can_be_limits)] = {}
    isolation: Literal[*get_args(WantedIsolation.__value__)] = "auto"  # type: ignore[valid-type]  # its values are known at import only
    egress: Annotated[Any, _fits(can_be_egress)] = {}
    service: Annotated[Any, _fits(can_be_service)] | None = None
    setup: Annotated[Any, _fits(requirements.can_be_setup)] | None = None
    lock: Annotated[Any, _fits(package_sets.can_be_lock)] | None = None
    storage: bool = True
    record_code: bool = True
    code: CodeValues | None
    version: _VersionNumber
    created_at: _Time
    updated_at: _Time
    last_run_at: _Time | None


class VersionValues(Values):
    """A version, with its data."""

    version: _VersionNumber
    created_at: _Time
    cause: Literal[*get_args(Cause.__value__)]  # type: ignore[valid-type]  # its values are known at import only
    run_id: _Id | None
    name: Annotated[str, _fits(re.compile(NAME).fullmatch)] | None = None
    snapshot: _Digest | None
    data: JsonObject


class _Destination(Values):
    host: _Text
    port: _Count
    address: _Text | None
    allowed: bool
    reason: _Text | None
    connections: _Count
    sent: _Count
    received: _Count
    secrets: Annotated[list[_Text], FailFast()] = []


class _Egress(Values):
    """Where a run connected to; see network/destinations.py."""

    destinations: Annotated[list[_Destination], FailFast()]
    more: _Count
    made: _Count = 0
    refused: _Count = 0
    sent: _Count = 0
    received: _Count = 0
    bytes: _Count = 0


class _Artifact(Values):
    type: Literal[*TYPES.values()]  # type: ignore[valid-type]  # its values are known at import only
    path: str
    size: _Count


class _Artifacts(Values):
    files: Annotated[list[_Artifact], FailFast(), Field(max_length=MOST)]
    more: _Count


class _Invocation(Values):
    command: Annotated[list[_Word], FailFast()] | _Word = []
    args: Annotated[list[_Word], FailFast()] = []
    truncated: bool = False


class RunValues(Values):
    """The record of a run, and the digests of its outputs."""

    id: _Id
    status: Literal[*(set(get_args(Status.__value__)) - {"running"})]  # type: ignore[valid-type]  # its values are known at import only
    started_at: _Time
    ended_at: _Time | None
    exit_code: _Int32 | None
    duration_us: _Count | None
    stdout_bytes: _Count
    stderr_bytes: _Count
    stdout_truncated: bool
    stderr_truncated: bool
    committed: bool
    reason: _Text | None
    version: _VersionNumber | None
    peak_memory_bytes: _Count | None
    cpu_us: _Count | None
    reaped: _Int32 | None
    enforced: JsonObject
    egress: Annotated[JsonObject, _fits_or_empty(_Egress)] = {}
    artifacts: Annotated[JsonObject, _fits_or_empty(_Artifacts)] = {}
    versions_dropped: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    setup_error: _Text | None = None
    code: _Word | None = None
    invocation: Annotated[
        JsonObject,
        _fits(lambda value: len(jsontext.compact(value)) <= _MAX_INVOCATION),
        _fits_or_empty(_Invocation),
    ] = {}
    stdout: _Digest | None
    stderr: _Digest | None


class HeadValues(Values):
    """The first line."""

    format: Literal[1]
    era: str
    exported_at: str
    session: JsonObject


PLAIN_FIELDS = SessionValues.model_fields.keys() & {field.name for field in fields(Session)} - {"setup"}
"""Fields of a session that are in a capsule as they are."""

RECORD_FIELDS = RunValues.model_fields.keys() & {field.name for field in fields(RunRecord)}
"""Fields of a run's record that are in a capsule."""
