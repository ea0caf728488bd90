"""Which languages there are, and which of them this machine can run."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from era import languages
from era.api.context import Answer, StrictRoute, errors

router = APIRouter(prefix="/api/languages", tags=["health"], route_class=StrictRoute)


class LanguageAnswer(BaseModel):
    name: str = Field(examples=["python"])
    title: str = Field(description="For people.", examples=["Python"])
    aliases: list[str] = Field(description="Other names that requests may use.", examples=[["py"]])
    version: str | None = Field(description="Of what runs it here; null where nothing does.", examples=["3.13.5"])
    available: bool
    endings: list[str] = Field(description="Of files that are taken for it.", examples=[[".py"]])
    packages: str | None = Field(description="The field of `setup` that installs packages for it.", examples=["pip"])
    reason: str | None = Field(default=None, description="Why it isn't available.")
    hint: str | None = Field(default=None, description="What to do about that.")


class LanguagesAnswer(BaseModel):
    languages: list[LanguageAnswer]


@router.get("", responses={200: {"model": LanguagesAnswer}, **errors()})
async def list_languages() -> Response:
    """List the languages, with what this machine can't run and why."""
    return Answer({"languages": [_shown(definition) for definition in languages.DEFINITIONS.values()]})


def _shown(definition: languages.Definition) -> dict[str, Any]:
    shown = {
        "name": definition.name,
        "title": definition.title,
        "aliases": definition.aliases,
        "version": None,
        "available": False,
        "endings": [ending for ending in definition.endings if languages.of_file(ending) == definition.name],
        "packages": definition.packages,
    }
    try:
        return {**shown, "version": languages.runtime(definition.name).version, "available": True}
    except languages.Missing as missing:
        return {**shown, "reason": missing.reason, "hint": missing.hint}
