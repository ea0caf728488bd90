"""uv, npm and go: how they are called, what they find configured, and what their errors mean.

The registries are those that the machine's own pip, uv and npm would ask: their variables and files are passed on.
uv knows nothing of pip's, so where uv has none pip's are translated.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import uv

from era.core.models import JsonObject
from era.core.requirements import Packages
from era.packages.processes import Ran

_PASSED_ON = re.compile(
    r"(UV_|NPM_CONFIG_).+|GO(PROXY|NOPROXY|PRIVATE|SUMDB|NOSUMDB|INSECURE)|(HTTPS?|ALL|NO)_PROXY|SSL_CERT_(FILE|DIR)|NODE_EXTRA_CA_CERTS",
    re.IGNORECASE,
)
_MACHINE_CERTS = Path("/etc/ssl/certs/ca-certificates.crt")
_PIP_OPTIONS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_EXTRA_INDEX_URL", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "no-index": ("UV_NO_INDEX", " "),
    "cert": ("SSL_CERT_FILE", " "),
}
"""Options of pip: what uv calls them, and what it wants between several values."""

_UV_HAS_INDEX = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_NO_INDEX")

_MEANINGS = (
    (r"[Nn]o space left|ENOSPC|EDQUOT|os error 28\b", "The server's disk is full."),
    (
        r"EFBIG|File too large|os error 27\b",
        "A file is larger than all may be together. The server's ERA_DISK_MB sets the bound.",
    ),
    (
        r"has no (usable )?wheels?\b|no wheels\b|[Bb]uilding .*from source is disabled|--no-build",
        "A package has no wheel for this server's Python, and building it would run its code here. Ask for another "
        "version or package.",
    ),
    (
        r"EALLOWREMOTE|EALLOWGIT|EALLOWFILE|EALLOWDIRECTORY|allow-(git|remote|file|directory)",
        "A package depends on one that isn't in the registry (a URL, a repository, a file).",
    ),
    (
        r"dns error|[Ff]ailed to lookup|error sending request|[Cc]onnection refused|tcp connect error|timed out"
        r"|[Ff]ailed to fetch|ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ERR_SOCKET_TIMEOUT",
        "The registry can't be reached from the server. POST …/setup tries again.",
    ),
    (
        r"no such host|i/o timeout|dial tcp",
        "The module proxy can't be reached from the server. POST …/setup tries again.",
    ),
    (
        r"404 Not Found|not found in the (package registry|provided package locations)|E404|ETARGET"
        r"|[Nn]o matching version|no versions? of|no matching versions",
        "There is no such package, or not in such a version.",
    ),
    (r"unsatisfiable|ERESOLVE|incompatible", "The packages and versions asked for can't go together."),
)
"""What a tool's output tells; the first one that is found counts."""


def uv_binary() -> Path:
    return Path(uv.find_uv_bin()).resolve()


def environment(home: Path, seen_home: str, given: Mapping[str, str]) -> dict[str, str]:
    """A tool's environment: what of ours (`given`) tells of registries, certificates and proxies. Configuration files
    are copied into `home`, which the tool sees as `seen_home`."""
    found = {name: value for name, value in given.items() if _PASSED_ON.fullmatch(name)}
    found = {name: value for name, value in found.items() if name not in _UV_OWN}
    found |= {"HOME": seen_home, "TMPDIR": seen_home, "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
    user = Path(given.get("HOME", "/"))
    npmrc = given.get("NPM_CONFIG_USERCONFIG") or given.get("npm_config_userconfig") or user / ".npmrc"
    if _copied(Path(npmrc), home, ".npmrc"):
        found["npm_config_userconfig"] = f"{seen_home}/.npmrc"
        found.pop("NPM_CONFIG_USERCONFIG", None)
    _copied(user / ".netrc", home, ".netrc")
    uv_files = [Path(given["UV_CONFIG_FILE"])] if "UV_CONFIG_FILE" in given else []
    uv_files += [Path(given.get("XDG_CONFIG_HOME") or user / ".config") / "uv/uv.toml", Path("/etc/uv/uv.toml")]
    for file in uv_files:
        if _copied(file, home, "uv.toml"):
            found["UV_CONFIG_FILE"] = f"{seen_home}/uv.toml"
            break
    else:
        found["UV_NO_CONFIG"] = "1"  # Or else it would look for a project above its directory.
        if not any(name in given for name in _UV_HAS_INDEX):
            found = {**_pip_options(given, user), **found}
    if _MACHINE_CERTS.exists():  # as pip does
        for name in ("UV_SYSTEM_CERTS", "UV_NATIVE_TLS"):  # the newer name and the older
            found.setdefault(name, "1")
    return found


_UV_OWN = {"UV_CONFIG_FILE", "UV_CACHE_DIR", "UV_TARGET", "UV_PREFIX", "UV_PYTHON", "UV_WORKING_DIRECTORY"}


def pip_command(python: str, target: str, requirements: str, cache: str, uv_path: str) -> list[str]:
    return [
        uv_path, "pip", "install", "--python", python, "--target", target, "--only-binary", ":all:",
        "--link-mode", "copy", "--no-python-downloads", "--no-progress", "--color", "never", "--cache-dir", cache,
        "--requirements", requirements,
    ]  # fmt: skip


def npm_command(node: str, cache: str) -> list[str]:
    command = [f"{node}/bin/node", f"{node}/lib/node_modules/npm/bin/npm-cli.js", "install"]
    options = ["ignore-scripts", "no-audit", "no-fund", "no-progress", "no-update-notifier", "no-global"]
    # What isn't in a registry could be a file of this machine, or anything that it can reach.
    options += [f"allow-{kind}=none" for kind in ("git", "remote", "file", "directory")]
    options += ["package-lock", "install-strategy=hoisted", "loglevel=error", "logs-max=0", "color=false"]
    return [*command, *(f"--{option}" for option in options), f"--cache={cache}"]


def package_json(packages: Packages) -> str:
    return json.dumps({"name": "session", "version": "0.0.0", "private": True, "dependencies": dict(packages.npm)})


GO_MOD = "module session\n\ngo 1.25\n"
"""What a session's modules are added to."""


def go_environment(environment: Mapping[str, str], work: str) -> dict[str, str]:
    """The environment of the go command, which is to fetch from a proxy and to start nothing."""
    return {
        "GOPROXY": "https://proxy.golang.org",  # and not "direct", which has version control systems started
        **environment,
        "GOVCS": "*:off",
        "GOENV": "off",
        "GOTOOLCHAIN": "local",
        "GOMODCACHE": f"{work}/mod",
        "GOCACHE": f"{environment['HOME']}/go",
        "GOFLAGS": "-modcacherw -mod=mod",
        "CGO_ENABLED": "0",
    }


def go_commands(go: str, work: str, packages: Packages) -> list[list[str]]:
    modules = [f"{path}@{version}" for path, version in packages.go]
    return [[go, "get", "-C", work, *modules], [go, "mod", "download", "-C", work, "all"]]


def go_modules(project: Path) -> list[JsonObject]:
    """The modules in a go.sum whose content is there."""
    try:
        lines = [line.split() for line in (project / "go.sum").read_text().splitlines()]
    except FileNotFoundError:
        return []
    whole = sorted((line[0], line[1], line[2]) for line in lines if len(line) == 3 and not line[1].endswith("/go.mod"))
    return [{"name": path, "version": version, "integrity": told} for path, version, told in whole]


def problem(tool: str, ran: Ran) -> str:
    """Why a tool failed: what that means, and its own last lines."""
    said = "\n".join(line for line in (ran.stderr or ran.stdout).splitlines()[-20:] if line.strip())
    meaning = next((text for pattern, text in _MEANINGS if re.search(pattern, ran.stderr + ran.stdout)), "")
    return f"{tool} failed. {meaning}".rstrip() + (f"\n{said}" if said else f" Exit code {ran.code}.")


def _copied(file: Path, home: Path, name: str) -> bool:
    try:
        target = home / name
        shutil.copyfile(file, target)
    except OSError:
        return False
    stat = home.stat()
    os.chown(target, stat.st_uid, stat.st_gid)
    target.chmod(0o600)
    return True


def _pip_options(given: Mapping[str, str], user: Path) -> dict[str, str]:
    """pip's options, from its files and variables, as uv's variables."""
    parser = configparser.RawConfigParser(strict=False)
    files = [Path("/etc/xdg/pip/pip.conf"), Path("/etc/pip.conf")]
    files += [user / ".pip/pip.conf", user / ".config/pip/pip.conf"]
    if "PIP_CONFIG_FILE" in given:
        files.append(Path(given["PIP_CONFIG_FILE"]))
    for file in files:
        try:
            parser.read_string(file.read_text())
        except (OSError, configparser.Error, UnicodeDecodeError):
            continue
    found = {}
    for option, (name, between) in _PIP_OPTIONS.items():
        values = [parser.get(section, option, fallback="") for section in ("global", "install")]
        values.append(given.get(f"PIP_{option.upper().replace('-', '_')}", ""))
        if told := [value for value in values if value.strip()]:
            found[name] = between.join(told[-1].split())
    return found
