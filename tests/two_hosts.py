"""A server that tests reach through another host of its cluster: with `--through-another-host` it is what `server`,
`owners` and `own_server` make, so the tests of the API show that it makes no difference which host is called.

The rows have a trigger by which each new session is at home at one host, and tests call the other one. The trigger is
what a call that reached the home a moment earlier would have done.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import signal
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from era.cluster.local import certify
from tests.conftest import Server, assert_nothing_left, free_port, mounts

SECRET = "a secret that two hosts of a test know"
_LEASE_SECONDS = "60"
"""Longer than a busy machine keeps a host from sending heartbeats."""

_ELSEWHERE = """
CREATE TRIGGER elsewhere AFTER UPDATE OF url ON hosts WHEN NEW.url <> '{url}' BEGIN UPDATE hosts SET url = '{url}'; END
"""

_AT_HOME = """
DROP TRIGGER IF EXISTS at_home;
CREATE TRIGGER at_home AFTER INSERT ON sessions WHEN NEW.deleted_at IS NULL BEGIN
  INSERT INTO homes (session_key, host_id, epoch) VALUES (NEW.key, '{host}', 1);
END;
UPDATE homes SET host_id = '{host}', epoch = epoch + 1
  WHERE host_id = '' OR host_id IN (SELECT id FROM hosts WHERE dead);
INSERT INTO homes (session_key, host_id, epoch)
  SELECT key, '{host}', 1 FROM sessions WHERE deleted_at IS NULL AND key NOT IN (SELECT session_key FROM homes);
"""


@dataclass
class Home(Server):
    """The host that sessions are at home at. Its URL is that of the other one, which is called in its place; its
    process, directory and log are its own."""

    other: Server | None = None
    tls: bool = False
    """The hosts talk over TLS."""

    of_other: Mapping[str, str] = field(default_factory=dict)
    """Settings of the other host's own."""

    hosts_url: str = ""
    """Where the other host calls it."""

    @property
    def content_dir(self) -> Path:
        return self.data_dir.parent / f"{self.data_dir.name}-shared"

    @property
    def log_of_calls(self) -> str:
        assert self.other is not None
        return self.other.log

    def start(self) -> Home:
        """Start both hosts. Where only the home had ended, the other one is started anew, too."""
        self._stop_other()
        self.settings |= {"ERA_SHARED_DIR": str(self.content_dir), "ERA_CLUSTER_SECRET": SECRET}
        self.settings.setdefault("ERA_LEASE_SECONDS", _LEASE_SECONDS)
        certified: Mapping[str, Mapping[str, str]] = {"home": {}, "other": {}}
        if self.tls:
            certified = certify(self.data_dir.parent / f"{self.data_dir.name}-tls", ["home", "other"], "127.0.0.1")
            self.settings |= {**certified["home"], "ERA_CLUSTER_PORT": str(free_port())}
        super().start()
        self.hosts_url = f"https://127.0.0.1:{self.settings['ERA_CLUSTER_PORT']}" if self.tls else self.own_url
        self.make_home()
        own = {"ERA_CLUSTER_PORT": "0", "ERA_SPARES": "0"}  # it needs no sandboxes, so it is to make none ready either
        settings = {**self.settings, **certified["other"], **own, **self.of_other}
        place = self.data_dir.parent / f"{self.data_dir.name}-other"
        self.other = Server(
            place, settings, self.uid, self.hidden, self.weakness, start_seconds=self.start_seconds
        ).start()
        self.url = self.other.url
        return self

    def make_home(self) -> None:
        """Have all sessions at home here that are at home at no other host, and all new ones; and the other host know
        where this one is."""
        self._execute(_AT_HOME.format(host=_id_of(self)))
        self._tell_url()

    @contextmanager
    def said_to_be_at(self, url: str) -> Iterator[None]:
        """Within the block each host is told that the others are at this URL."""
        self._execute(_ELSEWHERE.format(url=url) + "; UPDATE hosts SET url = url;")
        try:
            yield
        finally:
            self._execute("DROP TRIGGER elsewhere;")
            self._tell_url()

    def _tell_url(self) -> None:
        """Say where this host is, as its next heartbeat does, which takes long with such a lease."""
        self._execute(f"UPDATE hosts SET url = '{self.hosts_url}' WHERE id = '{_id_of(self)}';")

    def _execute(self, statements: str) -> None:
        with closing(sqlite3.connect(self.content_dir / "era.sqlite", timeout=60)) as database:
            database.executescript(f"BEGIN IMMEDIATE; {statements} COMMIT;")

    def at_home(self) -> Server:
        """The host that sessions are at home at, as one that is called."""
        return Server(self.data_dir, self.settings, url=self.own_url, own_url=self.own_url)

    def stop(self, number: int = signal.SIGTERM, *, sandboxes_elsewhere: bool = False) -> int:
        """As that of any server. The other host is told to stop before the home is, and after it where that is killed;
        it ends in good order either way, and has sandboxes only where the test says so."""
        if number != signal.SIGKILL:
            self._stop_other(sandboxes_elsewhere=sandboxes_elsewhere)
        code = super().stop(number)
        self._stop_other(sandboxes_elsewhere=sandboxes_elsewhere)
        return code

    def _stop_other(self, *, sandboxes_elsewhere: bool = False) -> None:
        if self.other is None or self.other.process is None:
            return
        before, processes = mounts(), self.other.descendants()
        made = list((self.other.data_dir / "live").glob("sb-*"))
        its_own = sandboxes_elsewhere or self._some_began_elsewhere()
        assert self.other.stop() == 0, self.other.log
        assert its_own or not made, "the host that isn't the home made a sandbox"
        assert "Traceback" not in self.other.log, self.other.log
        assert_nothing_left(before, processes, self.other.data_dir)

    def _some_began_elsewhere(self) -> bool:
        """Whether there are sessions whose first home is the other host: those that it was asked to import."""
        assert self.other is not None
        begun = "SELECT 1 FROM homes WHERE epoch = 1 AND host_id = ?"
        with closing(sqlite3.connect(self.content_dir / "era.sqlite", timeout=60)) as database:
            return database.execute(begun, [_id_of(self.other)]).fetchone() is not None

    def _memory(self, field: str) -> int:
        """Of both hosts, as what passes through one must be bounded in both."""
        assert self.other is not None
        return super()._memory(field) + self.other._memory(field)

    def reset_peak(self) -> int:
        assert self.other is not None
        self.other.reset_peak()
        return super().reset_peak()

    def hop(self, method: str, target: str, at: str, said: Mapping[str, Any]) -> bytes:
        """The header of a request to it with this Host header, as a host signs it that says this."""
        told = {**said, "to": _id_of(self), "at": int(time.time() * 1e6)}
        content = base64.urlsafe_b64encode(json.dumps(told).encode())
        key = hmac.digest(SECRET.encode(), b"era hop", hashlib.sha256)
        signed = b"\n".join([b"1", method.encode(), target.encode(), at.encode(), content])
        return content + b"." + hmac.digest(key, signed, hashlib.sha256).hex().encode()


def _id_of(host: Server) -> str:
    return (host.data_dir / "host-id").read_text()
