"""uv, npm and go: their command lines, their configuration, and what their errors mean.

The registries are those that the machine's own pip, uv and npm would ask: their variables and files are passed on. uv
doesn't read pip's configuration, so where uv has no index of its own, pip's is translated.
"""

from __future__ import annotations

import configparser
import json
import netrc
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import uv

from era.core.models import JsonObject
from era.core.setup.package_sets import SetupFailed
from era.core.setup.requirements import Packages
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
"""Options of pip: the variable of uv that means the same, and what separates several values in it."""

_UV_HAS_INDEX = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_NO_INDEX")

_NO_WHEELS = r"ha(s|ve) no (usable )?wheels?\b|no wheels\b|[Bb]uilding .*from source is disabled|--no-build"
_MEANINGS = (
    (r"[Nn]o space left|ENOSPC|EDQUOT|os error 28\b", "The server's disk is full."),
    (
        r"EFBIG|File too large|os error 27\b",
        "A file is larger than all may be together. The server's ERA_DISK_MB sets the bound, and for what is built the "
        "session's 'limits'.",
    ),
    (
        r"[Ff]ailed to build|build backend|Failed to resolve requirements from `build-system",
        "A package has no wheel for this server's Python, and can't be built here. Ask for another version or package, "
        "or raise the session's 'limits'.",
    ),
    (_NO_WHEELS, "A package has no wheel for this server's Python."),
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
"""Patterns of a tool's output, and what they mean. The first that is found counts."""


_NO_SUCH = re.compile(
    rf"{_NO_WHEELS}|[Ff]ailed to build|build backend|404 Not Found|410 Gone|E404|ETARGET|[Nn]o matching version"
    r"|not found in (the )?(package registry|provided package locations)|no versions? of|no matching versions"
    r"|unsatisfiable|ERESOLVE|unknown revision"
)
_MAY_PASS = re.compile(
    r"[Nn]o space left|ENOSPC|EDQUOT|os error 28\b|dns error|[Ff]ailed to lookup|error sending request|timed out"
    r"|[Cc]onnection refused|tcp connect error|could not be queried|ENOTFOUND|EAI_AGAIN|ECONN(REFUSED|RESET)|ETIMEDOUT"
    r"|ERR_SOCKET_TIMEOUT|no such host|i/o timeout|dial tcp|\b(429|50[0-4])\b|Too Many Requests|Bad Gateway"
    r"|build-system\.requires"
)
"""Patterns of the output where a registry has said that there are no such packages, and where it may not have heard."""


def uv_binary() -> Path:
    """The uv that came with the service."""
    return Path(uv.find_uv_bin()).resolve()


def environment(home: Path, home_inside: str, given: Mapping[str, str]) -> dict[str, str]:
    """The environment variables of a tool: those of the service (`given`) that are about registries, certificates and
    proxies. Configuration files are copied into `home`, which the tool sees as `home_inside`."""
    variables = {name: value for name, value in given.items() if _PASSED_ON.fullmatch(name)}
    variables = {name: value for name, value in variables.items() if name not in _UV_OWN}
    variables |= {"HOME": home_inside, "TMPDIR": home_inside, "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
    user = Path(given.get("HOME", "/"))
    npmrc = given.get("NPM_CONFIG_USERCONFIG") or given.get("npm_config_userconfig") or user / ".npmrc"
    if _copied(Path(npmrc), home, ".npmrc"):
        variables["npm_config_userconfig"] = f"{home_inside}/.npmrc"
        variables.pop("NPM_CONFIG_USERCONFIG", None)
    _copied(user / ".netrc", home, ".netrc")
    uv_files = [Path(given["UV_CONFIG_FILE"])] if "UV_CONFIG_FILE" in given else []
    uv_files += [Path(given.get("XDG_CONFIG_HOME") or user / ".config") / "uv/uv.toml", Path("/etc/uv/uv.toml")]
    for file in uv_files:
        if _copied(file, home, "uv.toml"):
            variables["UV_CONFIG_FILE"] = f"{home_inside}/uv.toml"
            break
    else:
        variables["UV_NO_CONFIG"] = "1"  # or it would look for a project above its directory
        if not any(name in given for name in _UV_HAS_INDEX):
            variables = {**_pip_options(given, user), **variables}
    if _MACHINE_CERTS.exists():  # as pip does
        for name in ("UV_SYSTEM_CERTS", "UV_NATIVE_TLS"):  # the newer name and the older
            variables.setdefault(name, "1")
    return variables


_INDEX_SECRET = re.compile(r"UV_INDEX_.+_(USERNAME|PASSWORD)")
"""Variables with credentials for an index."""

_UV_OWN = {
    "UV_CONFIG_FILE", "UV_CACHE_DIR", "UV_TARGET", "UV_PREFIX", "UV_PYTHON", "UV_WORKING_DIRECTORY",
    "UV_COMPILE_BYTECODE",
}  # fmt: skip
"""Variables that aren't passed on: the service settles these itself."""


def pip_command(
    python: str, target: str, requirements: str, cache: str, uv_path: str, *, wheels_only: bool = True
) -> list[str]:
    """uv's command that installs packages into `target`. Paths are those that uv sees."""
    command = [
        uv_path, "pip", "install", "--python", python, "--target", target, "--link-mode", "copy",
        "--no-python-downloads", "--no-progress", "--color", "never", "--cache-dir", cache,
        "--requirements", requirements,
        "--no-compile-bytecode",  # a uv.toml may ask for it; it would be without bounds, and of another time each time
    ]  # fmt: skip
    return [*command, "--only-binary", ":all:"] if wheels_only else command


def indexes_command(python: str, requirements: str, uv_path: str) -> list[str]:
    """uv's command that prints the indexes that it asks."""
    return [
        uv_path, "pip", "compile", "--python", python, "--emit-index-url", "--no-header", "--quiet", "--no-cache",
        "--no-python-downloads", "--color", "never", requirements,
    ]  # fmt: skip


def indexes(output: str, netrc_file: Path, environment: Mapping[str, str]) -> list[str]:
    """The addresses in the output of that command; the first has the lowest priority. Raises SetupFailed where uv asks
    one of them with a name or password, which must not get to where packages' own code runs."""
    addresses = [line.partition(" ")[2].strip() for line in output.splitlines() if line.startswith("--")]
    named = {urlsplit(address).hostname for address in addresses}
    try:
        known: set[str | None] = set(netrc.netrc(netrc_file).hosts)
    except (OSError, netrc.NetrcParseError):
        known = set()
    secret = any("@" in urlsplit(address).netloc for address in addresses) or named & (known - {"default"})
    if secret or any(_INDEX_SECRET.fullmatch(name) for name in environment):
        raise SetupFailed(
            "A package has no wheel, and building it is not possible here: this server's package index asks for a "
            "password, which must not get to where a package's own code runs. Ask for another version or package.",
            no_such=True,
        )
    if not addresses:
        raise SetupFailed(
            "A package has no wheel, and this server has no package index to build it from.", no_such=True
        )
    return addresses


def npm_command(node: str, cache: str) -> list[str]:
    """npm's command that installs a project's dependencies and runs none of their code."""
    command = [f"{node}/bin/node", f"{node}/lib/node_modules/npm/bin/npm-cli.js", "install"]
    options = ["ignore-scripts", "no-audit", "no-fund", "no-progress", "no-update-notifier", "no-global"]
    # What isn't in a registry could be a file of this machine, or anything that it can reach.
    options += [f"allow-{kind}=none" for kind in ("git", "remote", "file", "directory")]
    options += ["package-lock", "install-strategy=hoisted", "loglevel=error", "logs-max=0", "color=false"]
    return [*command, *(f"--{option}" for option in options), f"--cache={cache}"]


def rebuild_command(node: str, project: str, names: Sequence[str]) -> list[str]:
    """npm's command that runs the install scripts of these packages, or builds them."""
    command = [f"{node}/bin/node", f"{node}/lib/node_modules/npm/bin/npm-cli.js", "rebuild", "--prefix", project]
    options = ["foreground-scripts", f"nodedir={node}", "no-audit", "no-fund", "no-update-notifier", "loglevel=error"]
    return [*command, *(f"--{option}" for option in options), "--logs-max=0", "--color=false", *names]


def npm_environment(environment: Mapping[str, str], cache: str) -> dict[str, str]:
    """npm's environment variables. Its own code is kept compiled in its cache, or each call would compile it again."""
    return {**environment, "NODE_COMPILE_CACHE": f"{cache}/node"}


def package_json(packages: Packages) -> str:
    """A package.json that asks npm for these packages."""
    overrides: JsonObject = {}
    for chain, version in packages.overrides:
        place = overrides
        for name in chain:
            place = place.setdefault(name, {})
        place["."] = version
    project = {"name": "session", "version": "0.0.0", "private": True, "dependencies": dict(packages.npm)}
    return json.dumps({**project, "overrides": overrides} if overrides else project)


GO_MOD = "module session\n\ngo 1.25\n"
"""The go.mod to which a session's modules are added."""


def go_environment(environment: Mapping[str, str], work: str) -> dict[str, str]:
    """The environment variables of a go command that fetches from a module proxy and starts no other program. `work` is
    the directory of the project, as the command sees it."""
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
    """The commands that add these modules to the project `work` and fetch them, with all that they need."""
    modules = [f"{path}@{version}" for path, version in packages.go]
    return [[go, "get", "-C", work, *modules], [go, "mod", "download", "-C", work, "all"]]


def pip_lock(site: Path) -> list[JsonObject]:
    """Name and version of every distribution in a site directory, by its metadata."""
    distributions = []
    for directory in sorted(site.glob("*.dist-info")):
        fields: dict[str, str] = {}
        with suppress(OSError), (directory / "METADATA").open(errors="replace") as file:
            for _ in range(100):
                line = file.readline(2000).rstrip()
                if not line:
                    break
                name, _, value = line.partition(": ")
                fields.setdefault(name.lower(), value)
        name, _, version = directory.name.removesuffix(".dist-info").rpartition("-")
        distributions.append({"name": fields.get("name", name)[:200], "version": fields.get("version", version)[:200]})
    return distributions


def go_modules(project: Path) -> list[JsonObject]:
    """The modules whose content was fetched, by the project's go.sum."""
    try:
        lines = [line.split() for line in (project / "go.sum").read_text().splitlines()]
    except FileNotFoundError:
        return []
    modules = sorted(
        (line[0], line[1], line[2]) for line in lines if len(line) == 3 and not line[1].endswith("/go.mod")
    )
    return [{"name": path, "version": version, "integrity": checksum} for path, version, checksum in modules]


def lacks_wheels(ran: Ran) -> bool:
    """Whether uv failed because a package has no wheel for this machine."""
    return re.search(_NO_WHEELS, ran.stderr) is not None


def no_such(ran: Ran) -> bool:
    """Whether a tool failed because there are no such packages, or none that go together or fit this machine."""
    output = ran.stderr + ran.stdout
    return _NO_SUCH.search(output) is not None and _MAY_PASS.search(output) is None


def npm_lock(project: Path) -> tuple[list[JsonObject], dict[str, bool]]:
    """The packages that npm has installed in a project, by its package-lock.json. Then the paths of those with install
    scripts, and whether each is optional."""
    locked = json.loads((project / "package-lock.json").read_text())["packages"]
    entries, scripts = [], {}
    for path, package in sorted(locked.items()):
        if not path or not (project / path).is_dir():
            continue  # the project itself, or an optional package for other machines
        name = package.get("name") or path.rpartition("node_modules/")[2]  # it may go by another one
        if package.get("hasInstallScript") or (project / path / "binding.gyp").exists():
            scripts[path] = bool(package.get("optional"))
        item = {"name": name, "version": package.get("version", ""), "integrity": package.get("integrity")}
        entries.append(item if path == f"node_modules/{name}" else {**item, "path": path})
    return entries, scripts


def problem(tool: str, ran: Ran) -> str:
    """The message for a tool that failed: what its output means, and its last lines."""
    last = "\n".join(line for line in (ran.stderr or ran.stdout).splitlines()[-20:] if line.strip())
    meaning = next((text for pattern, text in _MEANINGS if re.search(pattern, ran.stderr + ran.stdout)), "")
    return f"{tool} failed. {meaning}".rstrip() + (f"\n{last}" if last else f" Exit code {ran.code}.")


def _copied(file: Path, home: Path, name: str) -> bool:
    """Copy a configuration file into `home`, for its owner only. Returns whether it could be read."""
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
    """pip's options, from its configuration files and variables, as uv's variables."""
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
    variables = {}
    for option, (name, between) in _PIP_OPTIONS.items():
        values = [parser.get(section, option, fallback="") for section in ("global", "install")]
        values.append(given.get(f"PIP_{option.upper().replace('-', '_')}", ""))
        if given_values := [value for value in values if value.strip()]:
            variables[name] = between.join(given_values[-1].split())
    return variables
