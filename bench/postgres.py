"""A PostgreSQL server for cases, set up as it comes and durable, on the same disk as the service's data."""

from __future__ import annotations

import shutil
from functools import cache

from bench.arena import DISK, Arena
from era.cluster.trial import is_there
from tests.postgres import Postgres, directory_of_server

IS_THERE = is_there("postgresql")


@cache
def _server(arena: Arena) -> Postgres:
    """The server, which ends with the arena."""
    directory = directory_of_server(DISK)
    arena.closers.callback(shutil.rmtree, directory)
    made = Postgres(directory, options={"max_connections": "200", "max_pred_locks_per_transaction": "512"})
    made.start()
    arena.closers.callback(made.stop)
    return made


def new_database(arena: Arena) -> str:
    """The URL of a new database without tables."""
    server = _server(arena)
    return server.url(server.make_database(empty=True))
