"""Locks: which very packages a package set holds, so that it can be had once more elsewhere.

Theory of operation. A lock is `{pip, npm, go}`, each a list of `{name, version, …}` as a package set lists them. It is
shown to clients and goes into capsules. Where a session is imported, its lock turns the setup into one that asks for
exactly those versions. A lock in a capsule is a stranger's: what it may say is what could be asked for in a setup, and
nothing is ever believed of it but names and versions.

Modules of Go follow from the versions of those that were asked for. Of npm, a package may be there several times, below
those that need it; that is said with npm's overrides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

from era.core.models import JsonObject, Session
from era.core.setup.requirements import GO_PATH, GO_VERSION, NPM_NAME, PIP_NAME, Packages


class Locks(Protocol):
    """Tells which packages sessions have."""

    async def ensure(self, digest: str) -> None:
        """Have this package set on this machine. Raises Unavailable where that isn't possible now."""
        ...

    def lock(self, session: Session) -> JsonObject | None:
        """The lock of a session's package set, if that is here, or the one by which it is still to be made; None
        where there is none that can go into a capsule. Reads a file."""
        ...


KINDS = ("pip", "npm", "go")
MAX_PACKAGES = 5_000
"""Of each kind."""

_MAX_DEPTH = 20
_SHOWN = 5
_PIP_NAME = re.compile(PIP_NAME)
_PIP_VERSION = re.compile(r"[A-Za-z0-9.+!_-]{1,200}")
_NPM_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,200}")
_INTEGRITY = re.compile(r"[A-Za-z0-9+/=: -]{1,1000}")


def can_be_lock(value: object) -> bool:
    """Whether this is what some server could have written as a lock."""
    if not isinstance(value, dict) or value.keys() != set(KINDS):
        return False
    return all(
        isinstance(items, list) and len(items) <= MAX_PACKAGES and all(_can_be_item(kind, item) for item in items)
        for kind, items in value.items()
    )


def pinned(packages: Packages, lock: Mapping[str, Any]) -> Packages:
    """The same packages in the versions of a lock, and all that they need in its versions too."""
    pip = {f"{item['name']}=={item['version']}" for item in lock["pip"]} if packages.pip else set()
    top = {item["name"]: item["version"] for item in lock["npm"] if "path" not in item}
    overrides = sorted(_overrides(lock)) if packages.npm else ()
    modules = {item["name"]: item["version"] for item in lock["go"]}
    return replace(
        packages,
        pip=tuple(sorted(pip)) or packages.pip,
        npm=tuple((name, top.get(name, version)) for name, version in packages.npm),
        go=tuple((path, modules.get(path, version)) for path, version in packages.go),
        overrides=tuple(overrides),
    )


def differences(lock: Mapping[str, Any], installed: Mapping[str, Any]) -> str:
    """How what was installed differs from a lock, in words; "" where it doesn't."""
    found = []
    for kind in KINDS:
        wanted, there = ({_place(item): item for item in one[kind]} for one in (lock, installed))
        for place in sorted(wanted.keys() | there.keys()):
            before, now = wanted.get(place), there.get(place)
            if before is None or now is None or before["version"] != now["version"]:
                found.append(f"{place} {_version(now)}, not {_version(before)}")
            elif before.get("integrity") and now.get("integrity") and before["integrity"] != now["integrity"]:
                found.append(f"{place} {_version(now)} with other content")
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def _overrides(lock: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Below which packages of npm which one has which version. One that goes by another name is left to npm."""
    for item in lock["npm"]:
        chain = tuple(part.strip("/") for part in item.get("path", item["name"]).split("node_modules/") if part)
        if chain[-1] == item["name"]:
            yield chain, item["version"]


def _can_be_item(kind: str, item: object) -> bool:
    optional = {"pip": set[str](), "npm": {"integrity", "path"}, "go": {"integrity"}}[kind]
    if not isinstance(item, dict) or not {"name", "version"} <= item.keys() <= {"name", "version", *optional}:
        return False
    name, version = item["name"], item["version"]
    if not isinstance(name, str) or not isinstance(version, str) or len(name) > 300 or len(version) > 300:
        return False
    integrity = item.get("integrity")
    if integrity is not None and not (isinstance(integrity, str) and _INTEGRITY.fullmatch(integrity)):
        return False
    match kind:
        case "pip":
            return bool(_PIP_NAME.fullmatch(name) and _PIP_VERSION.fullmatch(version))
        case "npm":
            return _is_npm(name) and bool(_NPM_VERSION.fullmatch(version)) and _can_be_path(item.get("path", name))
    return ".." not in name and bool(GO_PATH.fullmatch(name) and GO_VERSION.fullmatch(version))


def _is_npm(name: str) -> bool:
    return len(name) <= 214 and name != "node_modules" and NPM_NAME.fullmatch(name) is not None


def _can_be_path(path: object) -> bool:
    """Whether this is where npm could have put a package, from the project."""
    if not isinstance(path, str) or len(path) > 4096:
        return False
    chain = path.removeprefix("node_modules/").split("/node_modules/")
    return len(chain) <= _MAX_DEPTH and all(map(_is_npm, chain))


def _place(item: JsonObject) -> str:
    return str(item.get("path", item["name"])).removeprefix("node_modules/")


def _version(item: JsonObject | None) -> str:
    return "(none)" if item is None else str(item["version"])
