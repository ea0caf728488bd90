"""Route of the languages: which there are, and which of them this machine can run."""

from __future__ import annotations

from fastapi import APIRouter, Response

from era import languages
from era.api.context import Answer, StrictRoute, errors
from era.wire.languages import LanguagesAnswer, language_answer

router = APIRouter(prefix="/api/languages", tags=["health"], route_class=StrictRoute)


@router.get("", responses={200: {"model": LanguagesAnswer}, **errors()})
async def list_languages() -> Response:
    """List the languages. For those that this machine can't run, the answer says why and what to do."""
    return Answer({"languages": [language_answer(definition) for definition in languages.DEFINITIONS.values()]})
