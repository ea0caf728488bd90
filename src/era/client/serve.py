"""`era serve` and `era doctor`: the only commands that import the server, which the plain install doesn't have."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from era.client.failure import Failure


def serve(
    *,
    host: str | None = None,
    port: int | None = None,
    data_dir: Path | None = None,
    public_url: str | None = None,
    allow_no_key: bool | None = None,
    isolation: str | None = None,
    log_level: str | None = None,
) -> int:
    """Serve the HTTP API.

    Each option is also an ERA_ variable, as ERA_PORT; docs/settings.md has these and all others.

    Examples:

        era serve
        era serve --port 9000 --data-dir /var/lib/era
        ERA_API_KEY=secret era serve --host 0.0.0.0

    Parameters
    ----------
    host
        Address to serve on; any but loopback needs ERA_API_KEY.
    port
        Port to serve on; 0 lets the system choose one.
    data_dir
        Directory of sessions, files and the database.
    public_url
        URL that programs see as ERA_BASE_URL.
    allow_no_key
        Serve an address other than loopback although no API key is set.
    isolation
        Kind of sandbox for sessions that don't choose one: auto, gvisor or bubblewrap.
    log_level
        debug, info, warning or error.
    """
    options = {name: value for name, value in locals().items() if value is not None}
    # Nothing is there yet that would have to be cleaned up, and imports take a while; run_service sees to signals then.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with _server_extra():
        from pydantic import ValidationError

        from era.preflight import check
        from era.settings import Settings
    try:
        settings = Settings(**options)
    except ValidationError as error:
        problem = error.errors()[0]
        raise Failure(f"ERA_{str(problem['loc'][0]).upper()}: {problem['msg']}") from None
    for warning in check(settings, os.environ):
        print(f"era: {warning}", file=sys.stderr)
    with _server_extra():
        from era.app import run_service
    return run_service(settings, lambda line: print(line, flush=True))


def doctor() -> int:
    """Report which isolation works on this machine, and how to get what doesn't.

    Makes a sandbox of each kind and runs a program of each language in it. Leaves with 0 if one kind works, else 1.

    Example:

        era doctor
    """
    import asyncio

    with _server_extra():
        from era.app import examine
        from era.doctor import report

    examined, default = asyncio.run(examine())
    for line in report(examined, default):
        print(line)
    return 0 if default else 1


@contextmanager
def _server_extra() -> Iterator[None]:
    """Turn the ImportError of a plain install into the command that installs the server."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "era":
            raise
        raise Failure(f"This needs the server ({error.name} is missing): pip install 'era-sessions[server]'") from None
