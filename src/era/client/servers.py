"""The server that a command calls, and the servers that `era login` remembers.

They are in the file `era/servers.json` below XDG_CONFIG_HOME, which only its owner can read. A remembered key is sent
to no other address than the one that it was remembered for.
"""

from __future__ import annotations

import os
from json import dumps, loads
from typing import Any

from era.client.output import Failure
from era.sdk.sync.client import Era

DEFAULT_URL = "http://127.0.0.1:8787"


class Servers:
    """The remembered servers: `{"current": NAME, "servers": {NAME: {"url", "key"}}}`."""

    def __init__(self) -> None:
        """Read them. Raises Failure."""
        home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        self.path = os.path.join(home, "era", "servers.json")
        self.current: str | None = None
        self.known: dict[str, dict[str, Any]] = {}
        try:
            with open(self.path, encoding="utf-8") as file:
                content = loads(file.read())
            self.known = dict(content["servers"])
            self.current = content["current"]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Failure(f"{self.path} can't be read: {error}\n     Delete it, and log in again.") from None

    def save(self) -> None:
        """Write them: all or nothing, for their owner only. Raises Failure."""
        part = f"{self.path}.{os.getpid()}"
        try:
            os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(dumps({"current": self.current, "servers": self.known}, indent=2) + "\n")
            os.replace(part, self.path)
        except OSError as error:
            raise Failure(f"{self.path} can't be written: {error.strerror}") from None

    def find(self, name: str | None) -> tuple[str, str | None]:
        """The address and key of a server, by its name or address; None: the one that is meant without any. Raises
        Failure."""
        named = name or os.environ.get("ERA_URL") or os.environ.get("ERA_SERVER")
        if named is None and self.current is not None:
            named = self.current
        named = named or DEFAULT_URL
        if "://" in named:
            url, key = named.rstrip("/"), self._key_of(named.rstrip("/"))
        elif named in self.known:
            url, key = str(self.known[named]["url"]), self.known[named].get("key")
        else:
            hint = f"Known are: {', '.join(sorted(self.known))}." if self.known else "`era login URL` remembers one."
            raise Failure(f"There is no server '{named}'.\n     {hint}")
        return url, os.environ.get("ERA_API_KEY") or key

    def _key_of(self, url: str) -> str | None:
        return next((server.get("key") for server in self.known.values() if server["url"] == url), None)


def connect(named: Any, **options: Any) -> Era:
    """A client of the server that a command's words name."""
    url, key = Servers().find(named.server)
    options.setdefault("retries", 2)
    options.setdefault("idempotency_keys", False)  # a person sees what happened; a run begins sooner without
    return Era(url, api_key=key or "", **options)
