"""A proxy between a store and PostgreSQL: it cuts the store off at any message, and counts how often it waits."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.postgres import Postgres

_SECONDS = 0.005
"""For which answers are held back, so that what is sent without waiting for them comes before them."""


class PostgresProxy:
    """Carries what a store and the server say, and cuts the store off at a message of its own:

    before   the server never gets it
    after    the server carries it out, and its answer doesn't arrive
    late     the server gets and carries it out half a second after the store was cut off
    """

    def __init__(self, postgres: Postgres) -> None:
        self._server = f"{postgres.socket}/.s.PGSQL.5432"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._plan: str | None = None
        self._message = 0
        """How many more messages until the cut; at 0 it is at the next COMMIT."""

        self.cuts = 0
        self.round_trips = 0
        """How often something was sent after an answer had come."""

        self.goes_on = threading.Event()
        """Cleared while the server hangs: nothing that is sent arrives."""

        self.goes_on.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, url: str) -> str:
        """The URL of a database as reached through here."""
        return f"postgresql://postgres@127.0.0.1:{self._listener.getsockname()[1]}/{database_of(url)}?sslmode=disable"

    def cut(self, when: str, message: int = 0) -> None:
        """Cut off at the next COMMIT, or at the message with this number from now on, counted from 1."""
        self._message, self._plan = message, when

    def spare(self) -> None:
        """Cut nothing off, after all."""
        self._plan = None

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _is_due(self, piece: bytes) -> bool:
        if self._plan is None:
            return False
        if not self._message:
            return b"COMMIT\0" in piece
        self._message -= 1
        return not self._message

    def _carry(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server, suppress(OSError):
            server.connect(self._server)
            is_cut, answered, heard = threading.Event(), threading.Event(), threading.Event()
            threading.Thread(
                target=self._carry_back, args=(server, client, is_cut, answered, heard), daemon=True
            ).start()
            while piece := client.recv(1 << 16):
                self.goes_on.wait()
                if heard.is_set():
                    heard.clear()
                    self.round_trips += 1
                if self._is_due(piece):
                    plan, self._plan = self._plan, None
                    self.cuts += 1
                    is_cut.set()
                    if plan == "late":
                        client.shutdown(socket.SHUT_RDWR)
                        time.sleep(0.5)
                    if plan != "before":
                        server.sendall(piece)
                        answered.wait(60 if b"COMMIT\0" in piece else 1)
                    break
                server.sendall(piece)
            server.shutdown(socket.SHUT_RDWR)
            client.shutdown(socket.SHUT_RDWR)

    def _carry_back(
        self,
        server: socket.socket,
        client: socket.socket,
        is_cut: threading.Event,
        answered: threading.Event,
        heard: threading.Event,
    ) -> None:
        with suppress(OSError):
            while piece := server.recv(1 << 16):
                time.sleep(_SECONDS)
                if is_cut.is_set():
                    answered.set()
                else:
                    heard.set()
                    client.sendall(piece)
            client.shutdown(socket.SHUT_RDWR)


def database_of(url: str) -> str:
    return url.partition("@/")[2].partition("?")[0]


@pytest.fixture
def postgres_proxy(postgres: Postgres) -> Iterator[PostgresProxy]:
    proxy = PostgresProxy(postgres)
    yield proxy
    proxy.close()
