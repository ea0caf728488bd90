"""What hosts of a cluster ask and tell each other, each by a request that only hosts can make (hop.py).

*Which sessions are active.* A list has sessions of any home. What one does is known to its home alone: who has its
turn, and what is held in memory. So whoever lists asks the homes of what is on the page, all at once and for one owner.
Each answers with the sessions that aren't idle, which are no more than a host has sandboxes and waiting callers. A host
that doesn't answer in time is left out.

*That something has changed which all know alike*: keys, quotas, webhooks. Each host reads those again with each
heartbeat. So that a key that is revoked is good nowhere once that is answered, whoever changes something tells the
others to read now. One that can't be told reads with its next heartbeat.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from urllib.parse import parse_qs, quote

import h11
import structlog
from starlette.types import Scope

from era.api.hop import HEADER, Hops, target_of
from era.api.host_connections import HostConnections
from era.core.homes import Homes, Host
from era.core.models import JsonObject, Session
from era.core.telemetry import new_request_id
from era.errors import EraError
from era.settings import Settings

log = structlog.get_logger()

_ACTIVE_PATH = "/cluster/active"
_CHANGED_PATH = "/cluster/changed"
_SECONDS = 2.0
_MAX_BYTES = 4 << 20


type Answering = Callable[[Scope], Awaitable[JsonObject]]


def answers(homes: Homes, active: Callable[[str], JsonObject]) -> Mapping[str, Answering]:
    """What other hosts ask, by path, and this one answers. `active` says which of an owner's sessions are active."""

    async def active_of_owner(scope: Scope) -> JsonObject:
        query: bytes = scope["query_string"]
        return active(parse_qs(query.decode("latin-1")).get("owner", [""])[0])

    async def changed(scope: Scope) -> JsonObject:
        await homes.catch_up()
        return {}

    return {_ACTIVE_PATH: active_of_owner, _CHANGED_PATH: changed}


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
        owner = f"owner={quote(sessions[0].owner, safe='')}"
        answers = await asyncio.gather(*(self._ask(host, _ACTIVE_PATH, owner) for host in hosts.values()))
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

    async def tell_changed(self) -> None:
        """Have the others read now what all know alike."""
        others = [host for host in self._homes.hosts.values() if host.url and host.id != self._homes.host_id]
        await asyncio.gather(*(self._ask(host, _CHANGED_PATH) for host in others))

    async def _ask(self, host: Host, path: str, query: str = "") -> JsonObject | None:
        """What a host answers; None where that is nothing of use."""
        try:
            async with asyncio.timeout(_SECONDS):
                return await self._answer(host, path, query)
        except (OSError, h11.RemoteProtocolError, ValueError, EraError) as error:
            log.info("host_not_asked", host=host.id, url=host.url, error=str(error) or type(error).__name__)
            return None

    async def _answer(self, host: Host, path: str, query: str) -> JsonObject:
        """Raises OSError, h11.RemoteProtocolError, ValueError."""
        connection = await self.connections.to(host.url)
        try:
            scope = _scope(path, query)
            header = self.hops.header(scope, host.id)
            named = [("host", "cluster"), (HEADER.decode(), header.decode())]
            request = h11.Request(method="GET", target=target_of(scope), headers=named)
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


def _scope(path: str, query: str) -> Scope:
    """That of the request, as far as its header is about it."""
    return {
        "type": "http",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(b"host", b"cluster")],
        "state": {"request_id": new_request_id()},
    }
