"""Storage: the bodies that write values, objects and SQL, and the answers of all its routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, FailFast, Field, Strict

from era.common.few_errors import at_most, few_wrong
from era.wire.base import Body

Metadata = Annotated[dict[str, Any] | None, Field(description="Kept with the value and shown in lists: at most 8 KiB.")]


class PutValue(Body):
    value: str = Field(description="Text of at most 1 MiB.")
    metadata: Metadata = None


class PutObject(Body):
    content: str = Field(description="The bytes as base64, at most 10 MiB of them.")
    metadata: Metadata = None


type Param = str | int | float | bool | Annotated[list[Annotated[int, Strict()]], FailFast()] | None

_MOST_PARAMS = 32_766
"""As many variables as a statement may have in SQLite as it is by default."""


def _is_param(value: Any) -> bool:
    """Whether pydantic would take this for a Param; it says of a wrong one what is wrong with it."""
    return all(type(each) is int for each in value) if isinstance(value, list) else not isinstance(value, dict)


class SqlBody(Body):
    sql: str = Field(description="SQLite's dialect.", examples=["SELECT * FROM users WHERE id = ?"])
    params: Annotated[
        Annotated[list[Param], FailFast()] | Annotated[dict[str, Param], few_wrong(_is_param)] | None,
        at_most(_MOST_PARAMS),
    ] = Field(None, description="Values for ?, or by name for :name; bytes as a list of numbers.")


class DoneAnswer(BaseModel):
    success: bool


class PutObjectAnswer(DoneAnswer):
    size: int


class ClearedAnswer(DoneAnswer):
    deleted: int


class ValueAnswer(BaseModel):
    value: str
    metadata: dict[str, Any] | None


class ObjectAnswer(BaseModel):
    content: str
    size: int
    uploaded: str
    customMetadata: dict[str, Any]


class KeyAnswer(BaseModel):
    name: str
    metadata: dict[str, Any] | None


class KeysAnswer(BaseModel):
    keys: list[KeyAnswer]
    list_complete: bool
    cursor: str | None


class ObjectKeyAnswer(BaseModel):
    key: str
    size: int
    uploaded: str


class ObjectsAnswer(BaseModel):
    objects: list[ObjectKeyAnswer]
    truncated: bool
    cursor: str | None


class SqlMeta(BaseModel):
    changes: int
    last_row_id: int
    changed_db: bool
    size_after: int
    duration: float


class SqlAnswer(BaseModel):
    success: bool
    results: list[dict[str, Any]]
    meta: SqlMeta


class ResourceAnswer(BaseModel):
    type: Literal["kv", "d1", "r2"]
    namespace: str
    key: str


class ResourcesAnswer(BaseModel):
    resources: list[ResourceAnswer]
    total: int
    limit: int
    offset: int
    has_more: bool


class StatsAnswer(BaseModel):
    total: int
    by_type: dict[str, int]
    by_namespace: dict[str, int]
    total_size: int
