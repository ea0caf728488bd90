"""API keys, owners and their quotas: the bodies that make and change them, and how they are shown."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, FailFast, Field, create_model

from era.core.models import timestamp
from era.core.owners.api_keys import DEFAULT_SCOPES, MAX_GRACE_SECONDS, OWNER, ApiKey, Scope
from era.core.owners.quotas import OF_KEYS, WORDS, Amounts
from era.wire.base import Body

MAX_QUOTA = 1 << 50


def _quota_fields(names: Any, value: Any) -> dict[str, Any]:
    return {
        name: (value, Field(None, ge=0, le=MAX_QUOTA, description=f"Most {WORDS[name]}. 0: no bound."))
        for name in names
    }


class _OwnerQuotas(Body):
    """The quotas to set, by name; what is left out stays. null takes one back: then the server's default holds."""


class _KeyQuotas(Body):
    """The quotas to set, by name; what is left out stays. null takes one back, 0 too."""


OwnerQuotas: Any = create_model("OwnerQuotas", __base__=_OwnerQuotas, **_quota_fields(WORDS, int | None))
KeyQuotas: Any = create_model("KeyQuotas", __base__=_KeyQuotas, **_quota_fields(OF_KEYS, int | None))

Scopes = Annotated[
    list[Scope],
    FailFast(),
    Field(
        min_length=1,
        description="What calls it is good for: `read`, `run`, `write`, which also decides what setups and public URLs "
        "run, and `admin` for the operator's.",
    ),
]
ExpiresAt = Annotated[
    str | None,
    Field(description="When it ends, as a time with its zone; null is never.", examples=["2030-01-31T12:00:00Z"]),
]


class KeyBody(Body):
    owner: str = Field(
        pattern=OWNER, description="Whose key it is. An owner exists once it is named here.", examples=["mina"]
    )
    description: str = Field("", max_length=1000, description="What the key is for, as a note to people.")
    scopes: Scopes = Field(default_factory=lambda: list(DEFAULT_SCOPES))
    expires_at: ExpiresAt = None
    quotas: KeyQuotas | None = None


class ChangeKey(Body):
    description: str | None = Field(None, max_length=1000)
    scopes: Scopes | None = None
    expires_at: ExpiresAt = None
    quotas: KeyQuotas | None = None


class RotateKey(Body):
    may_be_empty = True

    grace_seconds: float = Field(
        3600, ge=0, le=MAX_GRACE_SECONDS, description="Seconds for which the secret before stays good."
    )


class ChangeOwner(Body):
    quotas: OwnerQuotas


class ApiKeyAnswer(BaseModel):
    id: str
    owner: str
    description: str
    created_at: str
    scopes: list[Scope]
    expires_at: str | None = Field(description="When it ends; null is never.")
    quotas: dict[str, int] = Field(description="Its own, beside its owner's.")
    old_secret_until: str | None = Field(
        description="Until when the secret before the last rotation is good; null if there was none, or that is over."
    )


class NewKeyAnswer(ApiKeyAnswer):
    key: str = Field(repr=False, description="The key itself, which is shown in this answer only.")


class ApiKeysAnswer(BaseModel):
    keys: list[ApiKeyAnswer]
    count: int


class KeyRevokedAnswer(BaseModel):
    success: bool
    id: str


class OwnerAnswer(BaseModel):
    owner: str
    quotas: dict[str, int] = Field(description="Those in force, by name; 0: no bound.")
    set: dict[str, int] = Field(description="Those that were set for this owner; the others are the server's defaults.")
    used: dict[str, float] = Field(description="How much there is of each now, in the same units.")


class OwnersAnswer(BaseModel):
    owners: list[OwnerAnswer]
    count: int


class QuotasAnswer(OwnerAnswer):
    key: dict[str, Any] | None = Field(
        description="Id, scopes and quotas of the key that this call came with; null for a call without one."
    )


def key_answer(key: ApiKey, at: int) -> dict[str, Any]:
    """A key as it is at a time, in microseconds."""
    old_until = key.old_until if key.old_until is not None and key.old_until > at else None
    return {
        "id": key.id,
        "owner": key.owner,
        "description": key.description,
        "created_at": timestamp(key.created_at),
        "scopes": list(key.scopes),
        "expires_at": None if key.expires_at is None else timestamp(key.expires_at),
        "quotas": dict(key.quotas),
        "old_secret_until": None if old_until is None else timestamp(old_until),
    }


def owner_answer(owner: str, quotas: Amounts, own: Amounts, used: dict[str, float]) -> dict[str, Any]:
    return {"owner": owner, "quotas": {name: quotas.get(name, 0) for name in WORDS}, "set": dict(own), "used": used}
