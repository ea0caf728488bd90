"""What a host of a cluster is told of its certificate before it starts, and afterwards by `era doctor`."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import h11
import pytest
import uvloop
from cryptography.hazmat.primitives.asymmetric import ec

from era.api.hosts.hop import Hops
from era.api.hosts.other_hosts import HostConnections
from era.cluster.host_tls import host_tls
from era.core.cluster.homes import Homes, Host
from era.errors import NotReady
from era.network.issuer import Issuer
from era.server.doctor import cluster_findings
from era.server.preflight import check_cluster
from era.settings import Settings
from tests.unit.test_homes import Rows

ISSUER, FOREIGN = Issuer("hosts"), Issuer("others")
YEAR = timedelta(days=365)


def settings(directory: Path, content: Mapping[str, bytes], **changed: Any) -> Settings:
    """Those of a host whose files have this content, by the end of the settings' names."""
    files = {}
    for name, value in content.items():
        files[f"cluster_{name}"] = directory / name
        files[f"cluster_{name}"].write_bytes(value)
    shared = {"shared_dir": directory / "shared", "data_dir": directory / "data", "cluster_secret": "s" * 32}
    return Settings(**{**shared, **files, **changed})


def files(issuer: Issuer = ISSUER, name: str = "127.0.0.1", *, calls: bool = True, lasts: timedelta = YEAR) -> Any:
    key, certificate = issuer.issue([name], lasts, calls=calls)
    return {"authority": ISSUER.certificate, "certificate": certificate, "certificate_key": key}


@pytest.mark.parametrize(
    ("content", "changed", "said"),
    [
        (files(FOREIGN), {}, "unable to get local issuer certificate"),
        (files(name="127.0.0.2"), {}, "IP address mismatch"),
        (files(name="host-1.internal"), {"host_url": "https://host-2.internal:8788"}, "Hostname mismatch"),
        (files(calls=False), {}, "purpose"),
        (files(lasts=timedelta(seconds=-1)), {}, "certificate has expired"),
        ({**files(), "certificate_key": files()["certificate_key"]}, {}, "KEY_VALUES_MISMATCH"),
        ({**files(), "certificate": b"none"}, {}, "ERA_CLUSTER_CERTIFICATE and its key can't be used"),
        ({**files(), "authority": b"none"}, {}, "ERA_CLUSTER_AUTHORITY has no certificate"),
        ({"certificate": b""}, {}, "ERA_CLUSTER_CERTIFICATE_KEY and ERA_CLUSTER_AUTHORITY, too"),
        (files(), {"cluster_authority": Path("/nowhere")}, "ERA_CLUSTER_AUTHORITY can't be read"),
        (files(), {"host_url": "http://127.0.0.1:8788"}, "ERA_HOST_URL is plain"),
        (files(), {"host_url": "https://host..internal:8788"}, "is no name of a host"),
        (files(), {"shared_dir": None, "cluster_secret": None}, "ERA_SHARED_DIR"),
        ({}, {"cluster_port": 8788}, "ERA_CLUSTER_CERTIFICATE, too"),
    ],
)
def test_a_certificate_that_the_others_would_refuse(
    tmp_path: Path, content: Mapping[str, bytes], changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(NotReady, match=said) as problem:
        check_cluster(settings(tmp_path, content, **changed))
    assert "\n" not in problem.value.message
    assert not problem.value.hint


@pytest.mark.parametrize("url", ["http://host-1:99999", "http://[::1:8787"])
def test_an_address_at_which_no_host_can_be_called(tmp_path: Path, url: str) -> None:
    """All others would trip over it."""
    with pytest.raises(NotReady, match="ERA_HOST_URL"):
        check_cluster(settings(tmp_path, {}, host_url=url))


def test_a_key_that_tls_has_no_signatures_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ec, "SECP256R1", ec.SECP256K1)
        content = files()
    with pytest.raises(NotReady, match="Other hosts wouldn't take ERA_CLUSTER_CERTIFICATE"):
        check_cluster(settings(tmp_path, content))


def test_a_certificate_for_the_name_at_which_the_others_call(tmp_path: Path) -> None:
    named = settings(tmp_path, files(name="host-1.internal"), host_url="https://host-1.internal:8788")
    check_cluster(named)
    tls = host_tls(named)
    assert tls is not None
    assert tls.names == ("host-1.internal",)
    assert host_tls(Settings()) is None


def test_the_doctor_says_until_when_a_certificate_is_good(tmp_path: Path) -> None:
    (finding,) = cluster_findings(settings(tmp_path, files()))
    assert finding.there
    assert "127.0.0.1" in finding.text
    for lasts in (timedelta(days=13), timedelta(seconds=-1)):
        (finding,) = cluster_findings(settings(tmp_path, files(lasts=lasts)))
        assert not finding.there
        assert finding.remedy
    assert not list(cluster_findings(Settings()))


@asynccontextmanager
async def answering(directory: Path, answer: bytes) -> AsyncIterator[tuple[HostConnections, Host]]:
    """What gives this answer, with a certificate that is trusted, as a proxy has that stands in front of a host."""
    tls = host_tls(settings(directory, files()))
    assert tls is not None
    homes = Homes(Rows(), 60, lambda: None)
    await homes.start()

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await reader.read()
        writer.close()

    try:
        async with asyncio.timeout(60), await asyncio.start_server(answers, "127.0.0.1", ssl=tls.server) as server:
            url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            yield HostConnections(Hops("secret", homes, Settings()), tls), Host("another", url)
    finally:
        await homes.leave()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\n[]",
        b"hello\r\n\r\n",
    ],
)
async def test_what_answers_as_no_host_does_is_one_that_cannot_be_reached(tmp_path: Path, answer: bytes) -> None:
    async with answering(tmp_path, answer) as (connections, host):
        with pytest.raises(OSError, match="no host of a cluster"):
            await connections.to(host)


async def test_a_host_of_the_version_before_does_not_know_the_first_question(tmp_path: Path) -> None:
    unknown = b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}"
    async with answering(tmp_path, unknown) as (connections, host):
        connection = await connections.to(host)
        assert connection.http.our_state is h11.IDLE
        connection.writer.transport.abort()


async def test_a_host_that_ends_is_one_that_cannot_be_reached(tmp_path: Path) -> None:
    last = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"
    async with answering(tmp_path, last) as (connections, host):
        with pytest.raises(OSError, match="hangs up after its first answer"):
            await connections.to(host)


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_connection_that_was_reset_is_not_taken_for_another_call(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """As by a host whose machine was started again: a reader doesn't tell a reset as the end of the stream."""
    accepted: list[asyncio.StreamWriter] = []

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(writer)
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    async def asks() -> None:
        homes = Homes(Rows(), 60, lambda: None)
        await homes.start()
        async with asyncio.timeout(60), await asyncio.start_server(answers, "127.0.0.1") as server:
            host = Host("another", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            connections = HostConnections(Hops("secret", homes, Settings()), None)
            assert await connections.ask(host, "/") == {}
            assert await connections.ask(host, "/") == {}
            (connection,) = accepted
            at_once = struct.pack("ii", 1, 0)
            connection.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            connection.transport.abort()
            await asyncio.sleep(0.2)  # so that both ends have seen it
            assert await connections.ask(host, "/") == {}
            assert len(accepted) == 2
            connections.close_idle()
            accepted[-1].close()
        await homes.leave()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(asks())
