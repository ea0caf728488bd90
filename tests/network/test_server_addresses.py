"""What a server works with is out of reach of programs: the hosts of its cluster, PostgreSQL, S3, what it was told."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from ipaddress import ip_address
from pathlib import Path

import pytest
from pydantic import SecretStr

from era.choices import server_addresses
from era.core.allowlist import Address
from era.errors import BadRequest
from era.network.policy import CLOSED, SERVER, Policy, ServerAddresses, ranges
from era.settings import Settings
from era.store.place import servers_of
from tests.conftest import eventually
from tests.gvisor import BOTH_KINDS
from tests.network import world
from tests.network.conftest import Machine, NetServer, new_session

HOST = "INSERT INTO hosts (id, url, started_at, heartbeat_at, lease_us, dead) VALUES (?, ?, 1, ?, 3600000000, 0)"
REACH = """
import json, socket
found = {{}}
for place in {places!r}:
    kind = socket.SOCK_DGRAM if place.startswith("udp ") else socket.SOCK_STREAM
    try:
        where = socket.getaddrinfo(place.removeprefix("udp "), 9000, type=kind)[0]
        with socket.socket(*where[:3]) as sock:
            sock.settimeout(20)
            sock.connect(where[4])
            sock.send(b"x")
            found[place] = sock.recv(9).decode()
    except OSError as error: found[place] = error.strerror or str(error)
print(json.dumps(found))
"""
CALL = """
import urllib.request
print(urllib.request.urlopen("http://{host}:8787/health", timeout=20).read().decode())
try: urllib.request.urlopen("http://{host}:8787/api/sessions", timeout=20)
except urllib.error.HTTPError as error: print(error.code)
"""
PLACES = [world.OTHER, "other.test", f"::ffff:{world.OTHER}", f"udp {world.OTHER}"]
PLACES += ["10.77.0.2", "inside.test", world.PUBLIC_V6, "v6.test"]


@pytest.fixture(scope="module")
def host(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetServer]:
    """One of three of a cluster. Of the others one has a public address, and one a private one that is opened."""
    directory = tmp_path_factory.mktemp("host")
    server = machine.serve(
        directory / "data",
        ERA_SHARED_DIR=str(directory / "shared"),
        ERA_CLUSTER_SECRET="a secret of thirty-two characters",
        ERA_LEASE_SECONDS="60",
        ERA_EGRESS_PRIVATE="10.77.0.0/24",
        ERA_EGRESS_REFUSED=f"{world.PUBLIC_V6}, 192.0.2.0/24",
    )
    with closing(sqlite3.connect(directory / "shared" / "era.sqlite", timeout=60)) as rows, rows:
        for name, url in (("public", f"http://{world.OTHER}:8787"), ("private", "https://inside.test:8787")):
            rows.execute(HOST, (name, url, time.time_ns() // 1000))
    yield server
    server.stop()


@pytest.mark.parametrize("kind", BOTH_KINDS)
def test_no_host_of_the_cluster_is_reached(host: NetServer, machine: Machine, kind: str, tmp_path: Path) -> None:
    code = REACH.format(places=[*PLACES, world.PUBLIC])
    with host.client() as client:
        session = new_session(client, isolation=kind)
        refused = {**dict.fromkeys(PLACES, "Permission denied"), world.PUBLIC: "x"}
        # The others' addresses are known with the next heartbeat.
        assert eventually(lambda: json.loads(session.says(code, timeout=90)) == refused, 60), session.says(code)
        reasons = {each["reason"] for each in session.destinations() if not each["allowed"]}
        assert reasons == {"server_address", "closed"}
        # But for public URLs, at which any host would do.
        said = session.says(CALL.format(host=world.OTHER), timeout=60).split("\n")
        assert (json.loads(said[0])["status"], said[1]) == ("ok", "403")
    alone = machine.serve(tmp_path / "data", ERA_EGRESS_PRIVATE="10.77.0.0/24")
    with alone.client() as client:
        reached = json.loads(new_session(client, isolation=kind).says(code, timeout=90))
    alone.stop()
    assert reached == dict.fromkeys([*PLACES, world.PUBLIC], "x")


async def test_names_are_looked_up_again_and_what_was_found_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: dict[str, str | None] = {"db": "203.0.113.7", "host-2": "198.51.100.7"}
    urls = ["http://host-2:8787", "https://192.0.2.3:8788", ""]

    async def lookup(name: str, _port: int) -> Sequence[Address]:
        if (answer := answers.get(name)) is None:
            raise OSError(f"no {name}")
        return [ip_address(answer)]

    servers = ServerAddresses(["db", "2001:db8::5"], lambda: urls, lookup)
    policy = Policy(closed=ranges("203.0.113.200/29", "X"), servers=servers)

    def refused(*addresses: str) -> list[bool]:
        return [policy.refuses(ip_address(each)) is SERVER for each in addresses]

    assert refused("203.0.113.7") == [False]
    await servers.look()
    assert refused("203.0.113.7", "::ffff:203.0.113.7", "2001:db8::5", "198.51.100.7", "192.0.2.3") == [True] * 5
    assert servers.has_host(ip_address("198.51.100.7"), 8787)
    assert not servers.has_host(ip_address("198.51.100.7"), 80)
    assert not servers.has_host(ip_address("192.0.2.3"), 8788), "it talks TLS there"
    assert policy.refuses(ip_address("203.0.113.201")) is CLOSED
    # A database that has failed over, a host that has gone.
    answers |= {"db": "203.0.113.8"}
    del urls[0]
    monkeypatch.setattr("era.network.policy._AGAIN_SECONDS", 0.0)
    await servers.look()
    assert refused("203.0.113.7", "203.0.113.8", "198.51.100.7") == [False, True, False]
    answers["db"] = None
    await servers.look()
    assert refused("203.0.113.8") == [True]


@pytest.mark.parametrize(
    ("url", "names"),
    [
        ("postgresql://era:p@db.example:5433/era", ["db.example"]),
        ("postgresql://a,b/era?target_session_attrs=read-write", ["a", "b"]),
        ("postgresql://[2001:db8::5]/era", ["2001:db8::5"]),
        ("postgresql:///era?host=a:5432&host=b:5433&hostaddr=203.0.113.7", ["a", "b", "203.0.113.7"]),
        ("postgresql:///era?host=/var/run/postgresql", []),
    ],
)
def test_the_servers_of_a_database(url: str, names: list[str]) -> None:
    assert servers_of(url) == names


async def test_the_database_and_the_bucket_are_out_of_reach() -> None:
    url, blobs = SecretStr("postgresql://era:p@203.0.113.7/era"), "s3://b/p?endpoint=http://203.0.113.9:9000"
    servers = server_addresses(Settings(database_url=url, blobs=blobs), None)
    await servers.look()
    assert [ip_address(f"203.0.113.{last}") in servers for last in (7, 8, 9)] == [True, False, True]


def test_what_is_no_range_is_refused() -> None:
    with pytest.raises(BadRequest, match="ERA_EGRESS_REFUSED has 'ray-head'"):
        ranges("203.0.113.7, ray-head", "ERA_EGRESS_REFUSED")
