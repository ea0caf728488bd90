"""Languages, as answers show them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from era import languages
from era.languages import Definition


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
