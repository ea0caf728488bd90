"""A server that tests reach through another host of its cluster: with `--through-another-host` it is what `server` and
`owners` are, so the tests of the API show that it makes no difference which host is called.

The rows have a trigger by which each new session is at home at one host, and tests call the other one. The trigger is
what a call that reached the home a moment earlier would have done.
"""

from __future__ import annotations

import signal
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import Server, assert_nothing_left, mounts

SECRET = "a secret that two hosts of a test know"
_LEASE_SECONDS = "60"
"""Longer than a busy machine keeps a host from sending heartbeats."""

_AT_HOME = """
CREATE TRIGGER at_home AFTER INSERT ON sessions WHEN NEW.deleted_at IS NULL BEGIN
  INSERT INTO homes (session_key, host_id, epoch) VALUES (NEW.key, '{host}', 1);
END
"""


@dataclass
class Home(Server):
    """The host that sessions are at home at. Its URL is that of the other one, which is called in its place; its
    process, directory and log are its own."""

    other: Server | None = None

    @property
    def content_dir(self) -> Path:
        return self.data_dir.parent / f"{self.data_dir.name}-shared"

    def start(self) -> Home:
        self.settings |= {"ERA_SHARED_DIR": str(self.content_dir), "ERA_CLUSTER_SECRET": SECRET}
        self.settings |= {"ERA_LEASE_SECONDS": _LEASE_SECONDS}
        super().start()
        host = (self.data_dir / "host-id").read_text()
        with closing(sqlite3.connect(self.content_dir / "era.sqlite")) as database:
            database.execute(_AT_HOME.format(host=host))
            # As its next heartbeat says, which takes long with such a lease.
            database.execute("UPDATE hosts SET url = ?", (self.own_url,))
            database.commit()
        settings = {**self.settings, "ERA_SPARES": "0"}
        self.other = Server(self.data_dir.parent / f"{self.data_dir.name}-other", settings).start()
        self.url = self.other.url
        return self

    def at_home(self) -> Server:
        """The host that sessions are at home at, as one that is called."""
        return Server(self.data_dir, self.settings, url=self.own_url, own_url=self.own_url)

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.other is not None
        before, processes = mounts(), self.other.descendants()
        assert not list((self.other.data_dir / "live").glob("sb-*")), "the host that isn't the home made a sandbox"
        assert self.other.stop() == 0, self.other.log
        assert "Traceback" not in self.other.log, self.other.log
        code = super().stop(number)
        assert_nothing_left(before, processes, self.other.data_dir)
        return code
