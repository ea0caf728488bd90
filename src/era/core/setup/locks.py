"""Locks: the exact versions of a package set, so that the same packages can be installed again elsewhere.

Theory of operation. A lock is `{pip, npm, go}`, each a list of `{name, version, …}` as in a package set. It is shown to
clients and put into capsules. When a session is imported, its lock turns the setup into one that asks for exactly those
versions. A lock in a capsule comes from a stranger: it may contain only what a setup could ask for, and nothing but its
names and versions is used.

For Go, the versions of the requested modules settle those of all others. With npm, the same package may be installed in
several versions, below the packages that need it; npm's overrides express that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from era.core.models import JsonObject
from era.core.setup.requirements import GO_PATH, GO_VERSION, NPM_NAME, PIP_NAME, Packages

KINDS = ("pip", "npm", "go")
MAX_PACKAGES = 5_000
"""Of each kind."""

_MAX_DEPTH = 20
"""Of a package of npm below others."""

_SHOWN = 5
"""Differences that are listed; the others are counted."""

_PIP_NAME = re.compile(PIP_NAME)
_PIP_VERSION = re.compile(r"[A-Za-z0-9.+!_-]{1,200}")
_NPM_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,200}")
_INTEGRITY = re.compile(r"[A-Za-z0-9+/=: -]{1,1000}")


def can_be_lock(value: object) -> bool:
    """Whether a server could have written this value as a lock. For locks from outside."""
    if not isinstance(value, dict) or value.keys() != set(KINDS):
        return False
    return all(
        isinstance(items, list) and len(items) <= MAX_PACKAGES and all(_can_be_item(kind, item) for item in items)
        for kind, items in value.items()
    )


def pinned(packages: Packages, lock: Mapping[str, Any]) -> Packages:
    """A request for the same packages in the versions of a lock, with everything they need in its versions, too."""
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
    """The differences between the installed packages and a lock, in words; "" if there are none."""
    found = []
    for kind in KINDS:
        locked, present = ({_identity(item): item for item in source[kind]} for source in (lock, installed))
        for place in sorted(locked.keys() | present.keys()):
            before, now = locked.get(place), present.get(place)
            if before is None or now is None or before["version"] != now["version"]:
                found.append(f"{place} {_version(now)}, not {_version(before)}")
            elif before.get("integrity") and now.get("integrity") and before["integrity"] != now["integrity"]:
                found.append(f"{place} {_version(now)} with other content")
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def _overrides(lock: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """npm's overrides that pin every package of a lock: the names of the packages that lead to it, itself last, and its
    version. A package that is installed under an alias is left to npm."""
    for item in lock["npm"]:
        chain = tuple(part.strip("/") for part in item.get("path", item["name"]).split("node_modules/") if part)
        if chain[-1] == item["name"]:
            yield chain, item["version"]


def _can_be_item(kind: str, item: object) -> bool:
    """Whether this is an entry of a lock's list `kind`."""
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
    """Whether npm could have installed a package at this path of a project."""
    if not isinstance(path, str) or len(path) > 4096:
        return False
    chain = path.removeprefix("node_modules/").split("/node_modules/")
    return len(chain) <= _MAX_DEPTH and all(map(_is_npm, chain))


def _identity(item: JsonObject) -> str:
    """What tells a package from others of its kind: npm's path, else the name."""
    return str(item.get("path", item["name"])).removeprefix("node_modules/")


def _version(item: JsonObject | None) -> str:
    return "(none)" if item is None else str(item["version"])
