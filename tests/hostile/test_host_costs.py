"""Count what a host of a cluster asks of PostgreSQL and S3: the inputs of bench/scaling.md, printed and bounded."""

from __future__ import annotations

import re
import time
from contextlib import closing

import psycopg
import pytest

from tests.conftest import MakeServer, eventually
from tests.postgres import Postgres
from tests.store.s3 import S3, FaultyS3

RUNS = 200
LEASE_SECONDS = 5
SILENT = "print(1)"
WRITES = "import os; open('f', 'wb').write(os.urandom(2000)); print(1)"


@pytest.mark.soak
def test_what_a_run_and_a_heartbeat_cost(
    own_server: MakeServer, postgres: Postgres, postgres_url: str, s3: S3, bucket: str, faulty: FaultyS3
) -> None:
    server = own_server(
        shared_dir=str(postgres.socket / "shared"),
        cluster_secret="a secret of thirty-two characters",
        database_url=postgres_url,
        blobs=s3.url(bucket, endpoint=faulty.endpoint),
        lease_seconds=str(LEASE_SECONDS),
    )
    log = postgres.socket / "log"
    postgres.execute("ALTER SYSTEM SET log_statement = 'all'", "SELECT pg_reload_conf()")
    try:
        with server.client() as client, closing(psycopg.connect(postgres_url, autocommit=True)) as rows:

            def statements() -> int:
                """Those of the server, without its BEGIN, COMMIT and ROLLBACK."""
                said = re.findall(r"(?:statement|execute [^:]*): (\w+)", log.read_text(errors="replace"))
                return sum(word not in ("BEGIN", "COMMIT", "ROLLBACK") for word in said)

            def wal() -> int:
                found = rows.execute("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint").fetchone()
                assert found is not None
                return int(found[0])

            def size() -> int:
                found = rows.execute("SELECT pg_database_size(current_database())").fetchone()
                assert found is not None
                return int(found[0])

            assert eventually(lambda: client.get("/ready").status_code == 200)
            before, begun = statements(), time.monotonic()
            time.sleep(6 * LEASE_SECONDS)
            idle = (statements() - before - 1) / (time.monotonic() - begun)
            print(f"\nidle: {idle:.1f} statements a second")
            client.post("/api/sessions", json={"session_id": "s", "language": "python"}).raise_for_status()
            for what, code in (("a run that changes nothing", SILENT), ("a run that writes 2 kB", WRITES)):
                client.post("/api/sessions/s/run", json={"code": code}).raise_for_status()
                faulty.fail(None)
                asked, written, held, begun = statements(), wal(), size(), time.monotonic()
                for _ in range(RUNS):
                    answer = client.post("/api/sessions/s/run", json={"code": code})
                    assert answer.status_code == 200, answer.text
                seconds = time.monotonic() - begun
                each = (statements() - asked - idle * seconds) / RUNS
                print(
                    f"{what}: {each:.1f} statements, {(wal() - written) / RUNS / 1000:.1f} kB of WAL, "
                    f"{(size() - held) / RUNS / 1000:.1f} kB of rows, {faulty.requests / RUNS:.1f} requests of S3"
                )
                assert each < 25
                assert faulty.requests / RUNS < 6
            held = size()
            for number in range(RUNS):
                made = {"session_id": f"idle{number}", "language": "python", "metadata": {"of": "whom"}}
                client.post("/api/sessions", json=made).raise_for_status()
            print(f"a session that does nothing: {(size() - held) / RUNS / 1000:.1f} kB of rows")
    finally:
        postgres.execute("ALTER SYSTEM RESET log_statement", "SELECT pg_reload_conf()")
