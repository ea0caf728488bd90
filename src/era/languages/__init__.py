"""The languages that there are: one module here for each, and nothing else anywhere that names one.

docs/languages.md shows how to add another.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from era.languages.base import Definition as Definition
from era.languages.base import Missing as Missing
from era.languages.base import Runtime as Runtime
from era.languages.preparation import Preparation


def _found() -> dict[str, Definition]:
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    definitions = [module.LANGUAGE for module in modules if hasattr(module, "LANGUAGE")]
    return {definition.name: definition for definition in sorted(definitions, key=lambda found: found.name)}


DEFINITIONS = _found()
"""By name, in the order of the alphabet."""

LANGUAGES: tuple[str, ...] = tuple(DEFINITIONS)

_ALIASES = {alias: name for name, definition in DEFINITIONS.items() for alias in (name, *definition.aliases)}


def canonical(name: str) -> str | None:
    """The language that `name` or its alias means, or None."""
    return _ALIASES.get(name.lower())


def of_file(ending: str) -> str | None:
    """The language of files that end so (".py"), or None."""
    return next((name for name, definition in DEFINITIONS.items() if ending in definition.endings), None)


def in_words() -> str:
    """Their names as a phrase: a, b or c."""
    *rest, last = LANGUAGES
    return f"{', '.join(rest)} or {last}"


@cache
def _looked_for(name: str) -> Runtime | Missing:
    try:
        return DEFINITIONS[name].find()
    except Missing as missing:
        return missing


def runtime(name: str) -> Runtime:
    """What runs a language on this machine, as it was when first asked. Raises Missing."""
    found = _looked_for(name)
    if isinstance(found, Missing):
        raise Missing(found.reason, found.hint)
    return found


def runtimes() -> dict[str, Runtime]:
    """What there is on this machine."""
    return {name: found for name in LANGUAGES if isinstance(found := _looked_for(name), Runtime)}


def preparations() -> dict[str, Preparation]:
    """What this machine's languages have prepared, by language."""
    found = {name: DEFINITIONS[name].preparation for name in runtimes()}
    return {name: prepare() for name, prepare in found.items() if prepare is not None}
