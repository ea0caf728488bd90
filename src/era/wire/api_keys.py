"""What clients send and get of API keys; see wire.py."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from era.core.api_keys import OWNER, ApiKey
from era.core.models import timestamp
from era.wire.base import Body


class KeyBody(Body):
    owner: str = Field(pattern=OWNER, description="Whose key it is; made by being named.", examples=["mina"])
    description: str = Field("", max_length=1000, description="What it is for, for people.")


class KeyAnswer(BaseModel):
    id: str
    owner: str
    description: str
    created_at: str


class NewKeyAnswer(KeyAnswer):
    key: str = Field(description="The key itself: told now, and never again.")


class KeysAnswer(BaseModel):
    keys: list[KeyAnswer]
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
