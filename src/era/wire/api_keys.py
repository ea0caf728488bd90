"""API keys: the body that makes one, and how they are shown."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from era.core.api_keys import OWNER, ApiKey
from era.core.models import timestamp
from era.wire.base import Body


class KeyBody(Body):
    owner: str = Field(
        pattern=OWNER, description="Whose key it is. An owner exists once it is named here.", examples=["mina"]
    )
    description: str = Field("", max_length=1000, description="What the key is for, as a note to people.")


class ApiKeyAnswer(BaseModel):
    id: str
    owner: str
    description: str
    created_at: str


class NewKeyAnswer(ApiKeyAnswer):
    key: str = Field(description="The key itself, which is shown in this answer only.")


class ApiKeysAnswer(BaseModel):
    keys: list[ApiKeyAnswer]
    count: int


class KeyRevokedAnswer(BaseModel):
    success: bool
    id: str


def key_answer(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "owner": key.owner,
        "description": key.description,
        "created_at": timestamp(key.created_at),
    }
