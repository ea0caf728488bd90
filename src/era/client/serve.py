"""`era serve`, `doctor` and `mcp`, which import more than the plain install has."""

from __future__ import annotations

import os
import signal
import sys
from argparse import BooleanOptionalAction
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from era.client.command import Command, argument
from era.client.output import Failure

if TYPE_CHECKING:
    from era.settings import Settings


_OPTIONS = ("host", "port", "data_dir", "public_url", "allow_no_key", "isolation", "log_level")


def serve(named: Any) -> int:
    options = {name: value for name in _OPTIONS if (value := getattr(named, name)) is not None}
    # Nothing is there yet that would have to be cleaned up, and imports take a while; run_service sees to signals then.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    settings = settings_of(**options)
    with server_extra():
        from era.server.preflight import check, take_address
    if named.cluster is not None:
        url = None if settings.database_url is None else settings.database_url.get_secret_value()
        return _serve_cluster(named, url, options)
    if named.label or named.keep_hosts or named.max_hosts is not None:
        raise Failure("--label, --keep-hosts and --max-hosts are for --cluster.")
    for warning in check(settings, os.environ):
        print(f"era: {warning}", file=sys.stderr)
    listening = take_address(settings)
    with server_extra():
        from era.app import run_service
    return run_service(settings, lambda line: print(line, flush=True), listening)


def _serve_cluster(named: Any, database_url: str | None, options: dict[str, Any]) -> int:
    """Have a host on each node of a Ray cluster. What these hosts have to check of settings and machine they check
    themselves."""
    with server_extra():
        from era.cluster.driver import drive, reach
        from era.cluster.host_process import of_cluster
        from era.server.preflight import check_variables
    labels = dict(label.partition("=")[::2] for label in named.label or ())
    if not all(labels.values()):
        raise Failure("--label is KEY=VALUE.")
    bounds = _bounds(named)
    for warning in check_variables(os.environ):
        print(f"era: {warning}", file=sys.stderr)
    hosts = reach(named.cluster, labels, database_url)
    given = {f"ERA_{name.upper()}": _spelt(value) for name, value in options.items()}
    settings = of_cluster(os.environ) | given
    return drive(hosts, settings, lambda line: print(line, flush=True), keep_hosts=named.keep_hosts, bounds=bounds)


def _bounds(named: Any) -> Any:
    """How many hosts there may be, a Bounds; None where their number is that of the nodes. Raises Failure."""
    with server_extra():
        from era.cluster.driver import Bounds
    if named.max_hosts is None:
        if named.min_hosts is not None or named.scale_down_seconds is not None:
            raise Failure("--min-hosts and --scale-down-seconds are for --max-hosts.")
        return None
    least = 1 if named.min_hosts is None else named.min_hosts
    seconds = 600.0 if named.scale_down_seconds is None else named.scale_down_seconds
    if not 1 <= least <= named.max_hosts or not seconds >= 0:
        raise Failure("--min-hosts is at least 1, and --max-hosts no less; --scale-down-seconds is no less than 0.")
    return Bounds(least, named.max_hosts, seconds)


def _spelt(value: object) -> str:
    """The value of an option as that of a variable, for processes that start elsewhere."""
    return str(value.absolute() if isinstance(value, Path) else value)


def doctor(_: Any) -> int:
    import asyncio

    settings = settings_of()
    with server_extra():
        from era.app import examine
        from era.server.doctor import report

    examined, default = asyncio.run(examine())
    for line in report(examined, default, settings):
        print(line)
    return 0 if default else 1


def settings_of(**options: Any) -> Settings:
    """The settings of a server: these, and those of the ERA_ variables. Raises Failure, which quotes no value: what is
    wrong may be a secret."""
    with server_extra():
        from pydantic import ValidationError

        from era.settings import Settings
    try:
        return Settings(**options)
    except ValidationError as error:
        problem = error.errors()[0]
        raise Failure(f"ERA_{str(problem['loc'][0]).upper()}: {problem['msg']}") from None


@contextmanager
def server_extra() -> Iterator[None]:
    """Turn the ImportError of a plain install into the command that installs the server."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "era":
            raise
        raise Failure(f"This needs the server ({error.name} is missing): pip install 'era-sessions[server]'") from None


def mcp(named: Any) -> None:
    import asyncio
    import ssl

    from era.client.servers import Servers
    from era.sdk.calls import address, authorization

    try:
        import httpx
        from mcp.server.stdio import stdio_server

        from era import __version__
        from era.mcp.calls import Calls
        from era.mcp.protocol import mcp_server
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "era":
            raise
        raise Failure(f"This needs more ({error.name} is missing): pip install 'era-sessions[mcp]'") from None

    server, key = Servers().find(named.server)
    server, headers = address(server), authorization(key)
    # The machine's own authorities, as all other commands have them; httpx has a list of its own.
    verify: ssl.SSLContext | bool = False if server.startswith("http://") else ssl.create_default_context()

    async def serve() -> None:
        timeout = httpx.Timeout(None, connect=10.0)
        async with (
            httpx.AsyncClient(base_url=server, timeout=timeout, trust_env=False, verify=verify) as client,
            stdio_server() as (read, write),
        ):
            tools = mcp_server(__version__, lambda _: Calls(client, headers))
            await tools.run(read, write, tools.create_initialization_options())

    asyncio.run(serve())


COMMANDS = {
    "doctor": Command(
        "Report which isolation works on this machine, and how to get what doesn't.\n\nMakes a sandbox of each "
        "kind and runs a program of each language in it. Leaves with 0 if one kind works, else 1.",
        doctor,
        ["era doctor"],
        has_json=False,
    ),
    "serve": Command(
        "Serve the HTTP API.\n\nEach option is also an ERA_ variable, as ERA_PORT; docs/settings.md has these and all "
        "others.",
        serve,
        [
            "era serve",
            "era serve --port 9000 --data-dir /var/lib/era",
            "ERA_API_KEY=secret era serve --host 0.0.0.0",
            "era serve --cluster auto",
        ],
        [
            argument("--host", help="address to serve on; any but loopback needs ERA_API_KEY"),
            argument("--port", type=int, help="port to serve on; 0 lets the system choose one"),
            argument("--data-dir", type=Path, metavar="DIR", help="directory of sessions, files and the database"),
            argument("--public-url", metavar="URL", help="URL that programs see as ERA_BASE_URL"),
            argument(
                "--allow-no-key", action=BooleanOptionalAction, help="serve other addresses although no API key is set"
            ),
            argument("--isolation", help="kind of sandbox where a session chooses none: auto, gvisor or bubblewrap"),
            argument("--log-level", metavar="LEVEL", help="debug, info, warning or error"),
            argument(
                "--cluster",
                metavar="ADDRESS",
                help="serve by a host on each node of a Ray cluster: HOST:PORT of its head, or auto, which is the one "
                "that this machine is a node of. Settings are those of all hosts (docs/cluster.md)",
            ),
            argument(
                "--label",
                action="append",
                metavar="KEY=VALUE",
                help="with --cluster: only nodes with this label of Ray's",
            ),
            argument(
                "--max-hosts",
                type=int,
                metavar="N",
                help="with --cluster: have Ray's autoscaler make nodes, up to N hosts",
            ),
            argument("--min-hosts", type=int, metavar="N", help="with --max-hosts: no fewer than N hosts; left out: 1"),
            argument(
                "--scale-down-seconds",
                type=float,
                metavar="S",
                help="with --max-hosts: a host goes when one fewer would have done for S seconds; left out: 600",
            ),
            argument(
                "--keep-hosts", action="store_true", help="with --cluster: leave the hosts running when this ends"
            ),
        ],
        has_json=False,
    ),
    "mcp": Command(
        "Serve tools to a model by the Model Context Protocol, on standard input and output.\n\nThey run code on a "
        "server, and work in its sessions. Programs that speak the protocol over HTTP need no\ncommand: the server has "
        "it at /mcp.",
        mcp,
        ["era mcp", "era mcp --server http://era.internal:8787"],
        has_json=False,
    ),
}
