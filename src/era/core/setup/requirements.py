"""Requests for packages: names and versions. URLs, paths, options and repositories are refused.

Clients send `{pip?: [..] | ".." | {requirements}, npm?: [..] | ".." | {packageJson}, go?: [..] | ".." | {goMod}, envs?,
commands?}`. Here that is parsed into `Packages`: requirements that pip, npm and Go can only take for names to look up
in their registries. So packages come only from where the operator of the server lets them come from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from era.core import jsontext
from era.core.models import JsonObject
from era.errors import BadRequest

MAX_PACKAGES = 200
"""Of each kind."""

MAX_COMMANDS = 50

MAX_COMMAND = 64 << 10
"""Bytes of a command. The kernel's bound for one argument of a process is 128 KiB."""

MAX_TEXT = 128 << 10
"""Characters of a requirements.txt, a package.json, a go.mod or a list of packages, its separators included."""

_LONGEST = 300
"""Characters of a name, a version or a requirement."""

PIP_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_PIP = re.compile(
    rf"(?P<name>{PIP_NAME})(?:\[{PIP_NAME}(?:,{PIP_NAME})*\])?"
    r"(?:(?:===|==|~=|!=|<=|>=|<|>)[A-Za-z0-9.*+!_-]+"
    r"(?:,(?:===|==|~=|!=|<=|>=|<|>)[A-Za-z0-9.*+!_-]+)*)?"
)
_PIP_MARKER = re.compile(r"""[A-Za-z0-9_.<>=!~()'", -]+""")
_PIP_TIGHT = re.compile(r"\s*(===|==|~=|!=|<=|>=|<|>|,|\[)\s*|\s+(?=\])")
NPM_NAME = re.compile(r"(?:@[a-z0-9~-][a-z0-9._~-]*/)?[a-z0-9~][a-z0-9._~-]*", re.IGNORECASE)
_NPM_VERSION = re.compile(r"[0-9A-Za-z.^~<>=|*+ -]*")
_NPM_FIELDS = ("optionalDependencies", "devDependencies", "dependencies")
"""Fields of a package.json. If several have the same name, the last one counts."""

GO_PATH = re.compile(r"[a-z0-9][a-z0-9-]*(?:\.[a-z0-9-]+)+(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*")
GO_VERSION = re.compile(r"v[0-9]+(?:\.[0-9]+){0,2}(?:[-+.][0-9A-Za-z.+-]*)?|latest")
_GO_IGNORED = ("module", "go", "toolchain", "retract", "tool", "ignore", "godebug")
"""Directives of a go.mod that say nothing about dependencies."""

_HINT = "Give names and versions, such as 'requests>=2.32' or 'axios@^1'; see docs/packages.md."


@dataclass(frozen=True, slots=True)
class Packages:
    """Requested packages, in alphabetical order: pip's requirements, npm's names and version ranges, Go's module paths
    and versions."""

    pip: tuple[str, ...] = ()
    npm: tuple[tuple[str, str], ...] = ()
    go: tuple[tuple[str, str], ...] = ()
    overrides: tuple[tuple[tuple[str, ...], str], ...] = ()
    """npm's overrides: the names of the packages that lead to one, itself last, and its version; see
    package_sets.py."""

    def __bool__(self) -> bool:
        return bool(self.pip or self.npm or self.go)


def setup_text(setup: Mapping[str, Any] | None) -> str | None:
    """A client's setup as JSON text, None for an empty one. Raises BadRequest where it asks for what can't be
    installed."""
    kept = {name: value for name, value in (setup or {}).items() if value}
    if not kept:
        return None
    packages_of(kept)
    _check_commands(kept.get("commands", ()))
    return jsontext.compact(kept)


def packages_of(setup: Mapping[str, Any]) -> Packages:
    """The packages that a setup asks for. Raises BadRequest for anything that isn't a package. What is listed twice is
    looked at once, since others wait for this."""
    pip, npm, go = setup.get("pip") or (), setup.get("npm") or (), setup.get("go") or ()
    if isinstance(pip, Mapping):
        pip = _text(pip.get("requirements", ""), "pip.requirements").splitlines()
    elif isinstance(pip, str):
        pip = _text(pip, "pip").splitlines()
    if isinstance(npm, Mapping):
        ranges = _parse_package_json(_text(npm.get("packageJson", ""), "npm.packageJson"))
    else:
        listed = _text(npm, "npm").split() if isinstance(npm, str) else _listed(npm, "npm")
        ranges = map(_parse_npm, _once(listed))
    if isinstance(go, Mapping):
        required = _parse_go_mod(_text(go.get("goMod", ""), "go.goMod"))
    else:
        listed = _text(go, "go").split() if isinstance(go, str) else _listed(go, "go")
        required = (_check_go(*item.strip().partition("@")[::2]) for item in _once(listed))
    lines = _listed(pip, "pip")
    requirements = _bounded(((item, item) for line in _once(lines) for item in _parse_pip_line(line)), "pip")
    versions, modules = _bounded(ranges, "npm"), _bounded(required, "go")
    return Packages(tuple(sorted(requirements)), tuple(sorted(versions.items())), tuple(sorted(modules.items())))


def commands(setup: str | None) -> list[str]:
    """The commands of a stored setup, in order."""
    listed: list[str] = json.loads(setup).get("commands", []) if setup else []
    return listed


def _check_commands(commands: Sequence[str]) -> None:
    """Raises BadRequest for commands that can't be run, or too many."""
    if len(commands) > MAX_COMMANDS:
        raise BadRequest(
            f"'setup.commands' has {len(commands)} commands, at most {MAX_COMMANDS} may be asked for.",
            hint="Put them into a script among the session's files, and run that.",
        )
    for command in commands:
        try:
            size = len(command.encode())
        except UnicodeEncodeError:
            size = MAX_COMMAND + 1
        if not command.strip() or "\0" in command or size > MAX_COMMAND:
            raise BadRequest(
                f"'setup.commands': {command[:100]!r} can't be run.",
                hint=f"A command is a line for sh, of at most {MAX_COMMAND >> 10} KiB, without NUL.",
                code="bad_setup",
            )


def can_be_setup(setup: object) -> bool:
    """Whether a server could have stored this value as a setup. For setups from outside, in capsules."""
    if not isinstance(setup, dict) or not setup.keys() <= {"pip", "npm", "go", "envs", "commands"}:
        return False
    envs = setup.get("envs", {})
    if not isinstance(envs, dict) or not all(isinstance(value, str) and "\0" not in value for value in envs.values()):
        return False
    if any(not name or "=" in name or "\0" in name for name in envs):
        return False
    for name, field in (("pip", "requirements"), ("npm", "packageJson"), ("go", "goMod")):
        part = setup.get(name, [])
        if isinstance(part, dict):
            part = list(part.values()) if part.keys() <= {field} else [None]
        if isinstance(part, str):
            part = [part]
        if not isinstance(part, list) or not all(isinstance(item, str) for item in part):
            return False
    listed = setup.get("commands", [])
    if not isinstance(listed, list) or not all(isinstance(command, str) for command in listed):
        return False
    try:
        return len(jsontext.compact(setup)) <= 8 * MAX_TEXT and setup_text(setup) is not None
    except BadRequest:
        return False


def _text(text: str, field: str) -> str:
    """The same text. Raises BadRequest where it is too long."""
    if len(text) > MAX_TEXT:
        raise BadRequest(f"'setup.{field}' has {len(text)} characters, {MAX_TEXT} are allowed.", hint=_HINT)
    return text


def _listed(items: Sequence[str], kind: str) -> Sequence[str]:
    """The same items. Raises BadRequest where they would be too long as one text."""
    size = sum(map(len, items)) + len(items)
    if size > MAX_TEXT + 1:  # a text may do without the separator at its end
        raise BadRequest(f"'setup.{kind}' has {size} characters in all, {MAX_TEXT} are allowed.", hint=_HINT)
    return items


def _once(items: Sequence[str]) -> Iterable[str]:
    """Each of these items once, in the place of its last mention, as the last one of a name counts."""
    return reversed(dict.fromkeys(reversed(items)))


def _bounded(packages: Iterable[tuple[str, str]], kind: str) -> dict[str, str]:
    """Packages by their names, the last one of a name. Raises BadRequest once they are too many: the rest isn't even
    looked at, since others wait for that."""
    kept: dict[str, str] = {}
    for name, version in packages:
        kept[name] = version
        if len(kept) > MAX_PACKAGES:
            raise BadRequest(f"'setup.{kind}' has too many packages, at most {MAX_PACKAGES} may be asked for.")
    return kept


def _parse_pip_line(line: str) -> Iterator[str]:
    """The requirements in a line of a requirements.txt: several, separated by spaces, or one with a marker (PEP 508).
    Raises BadRequest."""
    line = re.sub(r"(^|\s)#.*", "", line).strip()
    text, semicolon, marker = (part.strip() for part in line.partition(";"))
    # The pattern begins anew at each blank of a run, and goes to its end: so there is only one blank in a row.
    items = _PIP_TIGHT.sub(lambda match: match[1] or "", " ".join(text.split())).split()
    if semicolon and (len(items) != 1 or not _is_marker(marker)):
        raise _no_package("pip", line)
    for item in dict.fromkeys(items):
        if len(item) > _LONGEST or not _PIP.fullmatch(item):
            raise _no_package("pip", item)
        yield f"{item} ; {marker}" if semicolon else item


def _is_marker(text: str) -> bool:
    return len(text) <= _LONGEST and "--" not in text and _PIP_MARKER.fullmatch(text) is not None


def _parse_npm(item: str) -> tuple[str, str]:
    """Name and version range of `name@range`. Raises BadRequest."""
    name, _, version = item.strip().rpartition("@")
    if not name or name.endswith("/"):  # no version, and perhaps the @ of a scope
        name, version = item.strip(), ""
    return _check_npm(name, version, item)


def _check_npm(name: str, version: str, item: str) -> tuple[str, str]:
    """Name and version range of a package of npm. Raises BadRequest, which shows `item`."""
    fits = len(name) <= 214 and len(version) <= _LONGEST
    if not (fits and NPM_NAME.fullmatch(name) and _NPM_VERSION.fullmatch(version)) or name == "node_modules":
        raise _no_package("npm", item)
    return name, version.strip() or "*"


def _parse_package_json(text: str) -> Iterator[tuple[str, str]]:
    """The dependencies in a package.json: names and version ranges. Raises BadRequest."""
    try:
        package = jsontext.loads(text.encode())
    except (jsontext.JsonProblem, UnicodeEncodeError) as error:
        raise BadRequest(f"'setup.npm.packageJson' {error}.", hint="It is the text of a package.json.") from None
    for field in _NPM_FIELDS:
        listed: object = package.get(field, {}) if isinstance(package, dict) else None
        if not isinstance(listed, dict):
            raise BadRequest(f"'setup.npm.packageJson' is no package.json: '{field}' is no object.")
        for name, version in listed.items():
            if not isinstance(version, str):
                raise _no_package("npm", name)
            yield _check_npm(name, version, f"{name}@{version}")


def _check_go(path: str, version: str) -> tuple[str, str]:
    """Path and version of a module. Raises BadRequest."""
    version = version or "latest"
    if len(path) > _LONGEST or len(version) > _LONGEST or ".." in path or not GO_PATH.fullmatch(path):
        raise _no_package("go", f"{path}@{version}")
    if not GO_VERSION.fullmatch(version):
        raise _no_package("go", f"{path}@{version}")
    return path, version


def _parse_go_mod(text: str) -> Iterator[tuple[str, str]]:
    """The modules that a go.mod requires, with their versions. Raises BadRequest."""
    block = ""
    for line in text.splitlines():
        words = line.partition("//")[0].replace('"', "").split()
        if not words:
            continue
        if block:
            if words == [")"]:
                block = ""
                continue
        elif words[-1] == "(" and len(words) == 2:
            block = words[0]
            continue
        directive, rest = (block, words) if block else (words[0], words[1:])
        if directive == "require" and len(rest) == 2:
            yield _check_go(*rest)
        elif directive not in _GO_IGNORED:
            raise BadRequest(
                f"'setup.go.goMod': {line.strip()[:100]!r} can't be followed here.",
                hint="It may have `require`; `replace` and `exclude` belong into the session's own go.mod.",
                code="bad_setup",
            )


def _no_package(kind: str, item: str) -> BadRequest:
    """The error for an entry that isn't a package."""
    what = "an option" if item.startswith("-") else "no package that can be looked up by its name"
    return BadRequest(f"'setup.{kind}': {item[:100]!r} is {what}.", hint=_HINT, code="bad_setup")


def setup_view(setup: str | None) -> JsonObject | None:
    """A stored setup as the API shows it."""
    setup_object: JsonObject | None = json.loads(setup) if setup else None
    return setup_object


def lists(
    *, pip: Sequence[str] = (), npm: Sequence[str] = (), go: Sequence[str] = (), commands: Sequence[str] = ()
) -> JsonObject:
    """The part of a setup's result that lists what was installed and run."""
    installed = {"pip_packages": list(pip), "npm_packages": list(npm), "go_modules": list(go)}
    return {**installed, "commands_run": list(commands)}
