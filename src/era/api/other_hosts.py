"""Which sessions are active at other hosts of a cluster: that is in nobody's rows, so their homes are asked.

Theory of operation. A list has sessions of any home. What one does is known to its home alone: who has its turn, and
what is held in memory. So whoever lists asks the homes of what is on the page, all at once and for one owner, by a
request that only hosts can make (hop.py). It answers with the sessions that aren't idle, which are no more than a host
has sandboxes and waiting callers. A host that doesn't answer in time is left out.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from urllib.parse import parse_qs, quote

import h11
import structlog
from starlette.types import Scope

from era.api.hop import HEADER, Hops
from era.api.host_connections import HostConnections
from era.core.homes import Homes, Host
from era.core.models import JsonObject, Session
from era.core.telemetry import new_request_id
from era.errors import EraError
from era.settings import Settings

log = structlog.get_logger()

ACTIVE_PATH = "/cluster/active"
_SECONDS = 2.0
_MAX_BYTES = 4 << 20


def active_owner(scope: Scope) -> str:
    """The owner whose active sessions another host asks for."""
    query: bytes = scope["query_string"]
    return parse_qs(query.decode("latin-1")).get("owner", [""])[0]


class OtherHosts:
    """How the other hosts are called, and what sessions do there."""

    def __init__(self, homes: Homes, hops: Hops, connections: HostConnections) -> None:
        self._homes = homes
        self.hops = hops
        self.connections = connections

    async def active(self, sessions: Sequence[Session]) -> Mapping[int, tuple[str, int] | None]:
        """Status and number of processes of those of one owner's sessions that are at home at other hosts and active
        there, by key; None where its home doesn't tell."""
        if not sessions:
            return {}
        homes = await self._homes.others(sorted(session.key for session in sessions))
        hosts = {host.id: host for host in homes.values()}
        answers = await asyncio.gather(*(self._ask(host, sessions[0].owner) for host in hosts.values()))
        by_host = dict(zip(hosts, answers, strict=True))
        found: dict[int, tuple[str, int] | None] = {}
        for session in sessions:
            if (home := homes.get(session.key)) is not None:
                answer = by_host[home.id]
                if answer is None:
                    found[session.key] = None
                elif (told := answer.get(session.id)) is not None:
                    found[session.key] = (told[0], told[1])
        return found

    async def _ask(self, host: Host, owner: str) -> JsonObject | None:
        """What a host says is active, by id; None where it says nothing of use."""
        try:
            async with asyncio.timeout(_SECONDS):
                return await self._answer(host, f"owner={quote(owner, safe='')}")
        except (OSError, h11.RemoteProtocolError, ValueError, EraError) as error:
            log.info("host_not_asked", host=host.id, url=host.url, error=str(error) or type(error).__name__)
            return None

    async def _answer(self, host: Host, query: str) -> JsonObject:
        """Raises OSError, h11.RemoteProtocolError, ValueError."""
        connection = await self.connections.to(host.url)
        try:
            header = self.hops.header(_scope(query), host.id)
            named = [("host", "cluster"), (HEADER.decode(), header.decode())]
            request = h11.Request(method="GET", target=f"{ACTIVE_PATH}?{query}", headers=named)
            connection.writer.write(connection.http.send(request) or b"")
            connection.writer.write(connection.http.send(h11.EndOfMessage()) or b"")
            status, content = 0, bytearray()
            while not isinstance(event := connection.http.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    connection.http.receive_data(await connection.reader.read(1 << 16))
                elif isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data) and len(content) < _MAX_BYTES:
                    content += event.data
                else:
                    raise ConnectionError("it hung up, or its answer is too long")
            if status != 200:
                raise ConnectionError(f"it answered {status}")
            answer: JsonObject = json.loads(content)
            return answer
        finally:
            http = connection.http
            is_reusable = http.our_state is h11.DONE and http.their_state is h11.DONE
            self.connections.give_back(host.url, connection, is_reusable)


def other_hosts(settings: Settings, homes: Homes | None) -> OtherHosts | None:
    """The other hosts of the cluster; None outside of one."""
    if homes is None or settings.cluster_secret is None:
        return None
    hops = Hops(settings.cluster_secret.get_secret_value(), homes, settings)
    return OtherHosts(homes, hops, HostConnections())


def _scope(query: str) -> Scope:
    """That of the request, as far as its header is about it."""
    return {
        "type": "http",
        "method": "GET",
        "scheme": "http",
        "path": ACTIVE_PATH,
        "raw_path": ACTIVE_PATH.encode(),
        "query_string": query.encode(),
        "headers": [(b"host", b"cluster")],
        "state": {"request_id": new_request_id()},
    }
