"""The registry of languages: one module in this folder for each, and nothing else anywhere that names one.

docs/languages.md shows how to add another.
"""

from __future__ import annotations

import importlib
import pkgutil
from contextlib import suppress
from functools import cache

from era.languages import ipython
from era.languages.base import Definition as Definition
from era.languages.base import Missing as Missing
from era.languages.base import Runtime as Runtime
from era.languages.preparation import Preparation


def _definitions() -> dict[str, Definition]:
    """LANGUAGE of every module in this folder that has one, by its name."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    definitions = [module.LANGUAGE for module in modules if hasattr(module, "LANGUAGE")]
    return {definition.name: definition for definition in sorted(definitions, key=lambda definition: definition.name)}


DEFINITIONS = _definitions()
"""By name, in alphabetical order."""

LANGUAGES: tuple[str, ...] = tuple(DEFINITIONS)

_ALIASES = {alias: name for name, definition in DEFINITIONS.items() for alias in (name, *definition.aliases)}


def canonical(name: str) -> str | None:
    """The name of the language that has this name or alias, in any case; None if there is none."""
    return _ALIASES.get(name.lower())


def of_file(ending: str) -> str | None:
    """The name of the language of files with this ending, such as ".py"; None if there is none."""
    return next((name for name, definition in DEFINITIONS.items() if ending in definition.endings), None)


def in_words() -> str:
    """The names of all languages as a phrase: a, b or c."""
    *rest, last = LANGUAGES
    return f"{', '.join(rest)} or {last}"


@cache
def _find(name: str) -> Runtime | Missing:
    try:
        return DEFINITIONS[name].find()
    except Missing as missing:
        return missing


def runtime(name: str) -> Runtime:
    """The runtime of a language on this machine. It is looked for once. Raises Missing."""
    found = _find(name)
    if isinstance(found, Missing):
        raise Missing(found.reason, found.hint)
    return found


def runtimes() -> dict[str, Runtime]:
    """The runtimes that this machine has, by language."""
    return {name: runtime for name in LANGUAGES if isinstance(runtime := _find(name), Runtime)}


def contexts_missing(name: str) -> Missing | None:
    """What this machine lacks for contexts in a language that can have them."""
    if name == "python":
        try:
            ipython.packages()
        except Missing as missing:
            return missing
    return None


def preparations() -> dict[str, Preparation]:
    """The preparations that this machine's languages need, by language; and what contexts need, under `contexts`."""
    definitions = (DEFINITIONS[name] for name in runtimes())
    needed = {each.name: each.preparation() for each in definitions if each.preparation is not None}
    with suppress(Missing):
        needed["contexts"] = ipython.packages()
    return needed


def is_at_hand(name: str) -> bool:
    """Whether sandboxes of a language can be made without a long preparation."""
    make = DEFINITIONS[name].preparation
    return make is None or (preparation := make()).at_start or preparation.ready_place() is not None
