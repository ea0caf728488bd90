"""What hosts of a cluster ask and tell each other, each by a request that only hosts can make (hop.py), and their
connections, each for one request at a time and kept for the next.

*A new connection* first carries a question, and only one that was answered carries anything else. A host that stops
hangs up on connections of which it can't know yet that they are another host's. Over TLS, one that refuses this one's
certificate does so after this one's end of the handshake, and hangs up. Neither must be taken for the loss of a
request.

*Which sessions are active.* A list has sessions of any home. What one does is known to its home alone: who has its
turn, and what is held in memory. So whoever lists asks the homes of what is on the page, all at once and for one owner.
Each answers with the sessions that aren't idle, which are no more than a host has sandboxes and waiting callers. A host
that doesn't answer in time is left out.

*That something has changed which all know alike*: keys and quotas. Each host reads those again with each
heartbeat. So that a key that is revoked is good nowhere once that is answered, whoever changes something tells the
others to read now. One that can't be told reads with its next heartbeat.

*What owners use there*, for whoever shows that beside quotas.

*How they are*, for the operator's list of hosts.

*How much room they have for sessions*, which a host asks that has none (core/cluster/moves.py), and that there is a
setup for them to do.

*Whether they trust each other*, by their secret and over TLS (host_tls.py), which a host asks the others when it
starts.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qs, quote, urlsplit

import h11
import structlog
from starlette.types import Scope

from era.api.hosts.hop import HEADER, Hops, target_of
from era.api.protocol.dead_peers import ask_when_idle
from era.api.protocol.protocol import REUSED_SECONDS
from era.api.protocol.tunnel import PIECE, connect
from era.cluster.host_tls import HostTls, host_tls, why_refused
from era.core.cluster.homes import Homes, Host
from era.core.cluster.moves import Moves
from era.core.concurrency.streams import write
from era.core.models import JsonObject, Session
from era.core.telemetry import new_request_id
from era.errors import EraError, NotReady
from era.settings import Settings

HELLO_PATH = "/cluster/hello"
"""Of the question that comes first on each new connection."""

CONNECT_SECONDS = 3.0
_MOST_IDLE = 64
"""Connections to one host that are kept for the next calls."""

_MAX_BYTES = 4 << 20
_EXPIRED = 10
"""X509_V_ERR_CERT_HAS_EXPIRED of OpenSSL (x509_vfy.h)."""


class NotTrusted(OSError):
    """The other host and this one don't take each other for hosts of one cluster. Nothing was sent to it."""


class Expired(NotTrusted):
    """The other host's certificate was good until its time ended."""


class HungUp(ConnectionError):
    """The other host hung up when it had seen this one's certificate: it refuses that, or it ends."""


@dataclass(eq=False, slots=True)
class Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    http: h11.Connection
    used_at: float = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the other host has not hung up, as far as this one knows."""
        return not self.writer.is_closing() and not self.reader.at_eof()

    @property
    def is_reusable(self) -> bool:
        """Whether it may carry another request: both directions have ended, and well."""
        return self.http.our_state is h11.DONE and self.http.their_state is h11.DONE


class HostConnections:
    """Connections to other hosts, each for one request at a time."""

    def __init__(self, hops: Hops, tls: HostTls | None) -> None:
        """With `tls` no other host is called than over that, with this host's certificate."""
        self._hops = hops
        self._idle: dict[str, list[Connection]] = {}
        self.tls = tls
        """None where this host talks plain."""

        self._client = None if tls is None else tls.client

    async def to(self, host: Host) -> Connection:
        """A connection to this host. Raises NotTrusted, OSError."""
        if not host.url:
            raise ConnectionError("that host doesn't listen yet")
        idle = self._idle.get(host.url, [])
        while idle:
            connection = idle.pop()
            if connection.is_open and time.monotonic() - connection.used_at < REUSED_SECONDS:
                connection.http.start_next_cycle()
                return connection
            connection.writer.transport.abort()
        parts = urlsplit(host.url)
        if parts.scheme != "https":
            if self.tls is not None:
                raise NotTrusted(f"it talks plain at {host.url}, and this host over TLS only")
            connection = await self._connect(parts.hostname, parts.port or 80, None)
        else:
            connection = await self._connect_tls(parts.hostname, parts.port or 443)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                status, _ = await self._exchange(connection, host, HELLO_PATH)
            if status not in (200, 404):  # a host of the version before is not asked for more than an answer
                raise ConnectionError(f"it answered {status}")
            if not connection.is_reusable:
                raise ConnectionError("it hangs up after its first answer, as a host does that ends")
        except BaseException as error:
            connection.writer.transport.abort()
            if isinstance(error, ValueError | h11.RemoteProtocolError):
                raise ConnectionError("what answers there is no host of a cluster") from error
            raise
        connection.http.start_next_cycle()
        return connection

    async def _connect_tls(self, name: str | None, port: int) -> Connection:
        if self._client is None:
            self._client = await asyncio.to_thread(ssl.create_default_context)
        try:
            return await self._connect(name, port, self._client)
        except ssl.SSLCertVerificationError as error:
            kind = Expired if error.verify_code == _EXPIRED else NotTrusted
            raise kind(f"its certificate isn't good here: {why_refused(error)}") from None
        except ssl.SSLError as error:
            raise NotTrusted(f"it doesn't talk TLS as this host does: {why_refused(error)}") from None

    def give_back(self, host: Host, connection: Connection) -> None:
        """Keep the connection for the next request, or close it."""
        idle = self._idle.setdefault(host.url, [])
        if connection.is_reusable and len(idle) < _MOST_IDLE:
            connection.used_at = time.monotonic()
            idle.append(connection)
        else:
            connection.writer.transport.abort()

    def close_idle(self, seconds: float = 0.0) -> None:
        """Close those that nothing was sent by for so long: other hosts which stop needn't wait for that, and what they
        have closed keeps its descriptor here until then."""
        before, idle = time.monotonic() - seconds, self._idle
        self._idle = {}
        for url, connections in idle.items():
            for connection in connections:
                if connection.used_at > before:
                    self._idle.setdefault(url, []).append(connection)
                else:
                    connection.writer.transport.abort()

    async def ask(self, host: Host, path: str, query: str = "") -> JsonObject:
        """What a host answers to a question that only hosts may ask. Raises NotTrusted, OSError, ValueError, and
        h11.RemoteProtocolError."""
        connection = await self.to(host)
        try:
            status, answer = await self._exchange(connection, host, path, query)
            if status != 200:
                raise ConnectionError(f"it answered {status}")
            return answer
        finally:
            self.give_back(host, connection)

    async def _connect(self, name: str | None, port: int, tls: ssl.SSLContext | None) -> Connection:
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await connect(host=name, port=port, ssl=tls)
        ask_when_idle(writer)
        return Connection(reader, writer, h11.Connection(h11.CLIENT, max_incomplete_event_size=PIECE))

    async def _exchange(self, connection: Connection, host: Host, path: str, query: str = "") -> tuple[int, JsonObject]:
        """One question, and the status and content of its answer. Raises as `ask` does."""
        scope = _scope(path, query)
        header = self._hops.header(scope, host.id)
        named = [("host", "cluster"), (HEADER.decode(), header.decode())]
        http = connection.http
        write(connection.writer, http.send(h11.Request(method="GET", target=target_of(scope), headers=named)) or b"")
        write(connection.writer, http.send(h11.EndOfMessage()) or b"")
        status, content = 0, bytearray()
        while not isinstance(event := http.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                piece = await connection.reader.read(1 << 16)
                if not piece and not status:
                    if connection.writer.get_extra_info("ssl_object") is not None:
                        raise HungUp("it hung up when it had seen this host's certificate")
                    raise ConnectionError("it hung up before it had answered")
                http.receive_data(piece)
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data) and len(content) < _MAX_BYTES:
                content += event.data
            else:
                raise ConnectionError("it hung up, or its answer is too long")
        answer: JsonObject = json.loads(content)
        if not isinstance(answer, dict):
            raise ValueError("it answered something else than an object")
        if status == 403:
            raise NotTrusted(f"it says: {answer.get('error')}")
        return status, answer


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


log = structlog.get_logger()

_ACTIVE_PATH = "/cluster/active"
_CHANGED_PATH = "/cluster/changed"
_IN_USE_PATH = "/cluster/in-use"
_ROOM_PATH = "/cluster/room"
_SETUPS_PATH = "/cluster/setups"
_STATE_PATH = "/cluster/state"
_SECONDS = 2.0
"""For which a call of somebody else's waits."""

_ROOM_SECONDS = 1.0
"""For which a host is waited for that is to say how much room it has: calls wait meanwhile (moves.py)."""

_NO_ANSWER = (OSError, h11.RemoteProtocolError, ValueError, EraError)
_HINT = (
    "ERA_CLUSTER_SECRET is to be the same at all hosts, and ERA_CLUSTER_CERTIFICATE of one authority, or set at none."
)

type Answering = Callable[[Scope], Awaitable[JsonObject]]


def answers(
    homes: Homes,
    moves: Moves,
    active: Callable[[str], JsonObject],
    in_use: Callable[[], JsonObject],
    state: Callable[[], Awaitable[JsonObject]],
    kick_setups: Callable[[], None],
) -> Mapping[str, Answering]:
    """What other hosts ask, by path, and this one answers. `active` says which of an owner's sessions are active,
    `in_use` what each owner uses here, and `state` how this host is. `kick_setups` has setups looked for."""

    async def active_of_owner(scope: Scope) -> JsonObject:
        return active(_parameter(scope, "owner"))

    async def changed(scope: Scope) -> JsonObject:
        await homes.catch_up()
        return {}

    async def hello(scope: Scope) -> JsonObject:
        return {}

    async def used(scope: Scope) -> JsonObject:
        return in_use()

    async def room(scope: Scope) -> JsonObject:
        return await moves.room_for_others(_parameter(scope, "packages") or None)

    async def look_for_setups(scope: Scope) -> JsonObject:
        kick_setups()
        return {}

    async def own_state(scope: Scope) -> JsonObject:
        return await state()

    return {
        _ACTIVE_PATH: active_of_owner,
        _CHANGED_PATH: changed,
        HELLO_PATH: hello,
        _IN_USE_PATH: used,
        _ROOM_PATH: room,
        _SETUPS_PATH: look_for_setups,
        _STATE_PATH: own_state,
    }


class OtherHosts:
    """How the other hosts are called, and what sessions do there."""

    def __init__(self, homes: Homes, hops: Hops, connections: HostConnections) -> None:
        self._homes = homes
        self.hops = hops
        self.connections = connections
        homes.each_beat(self._close_idle)

    async def _close_idle(self) -> None:
        self.connections.close_idle(REUSED_SECONDS)

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

    async def active_of_owner(self, owner: str) -> Sequence[JsonObject]:
        """Ask the other hosts which of an owner's sessions are active there: `{id: [status, processes]}` of each host
        that answers."""
        query = f"owner={quote(owner, safe='')}"
        answers = await asyncio.gather(*(self._ask(host, _ACTIVE_PATH, query) for host in self._others()))
        return [answer for answer in answers if answer is not None]

    async def in_use(self) -> Sequence[JsonObject]:
        """What each owner uses at the other hosts, of each host that tells."""
        answers = await asyncio.gather(*(self._ask(host, _IN_USE_PATH) for host in self._others()))
        return [answer for answer in answers if answer is not None]

    async def states(self) -> Mapping[str, JsonObject]:
        """How the other hosts are that tell, by id."""
        others = self._others()
        answers = await asyncio.gather(*(self._ask(host, _STATE_PATH) for host in others))
        return {host.id: answer for host, answer in zip(others, answers, strict=True) if answer is not None}

    async def tell_changed(self) -> None:
        """Have the others read now what all know alike."""
        await asyncio.gather(*(self._ask(host, _CHANGED_PATH) for host in self._others()))

    async def check_trusted(self) -> None:
        """Raises NotReady where this host starts in a cluster whose hosts refuse it, or that it refuses. One whose
        certificate is too old by now says nothing about this host's."""
        tried = await asyncio.gather(*(self._refusal(host) for host in self._others()))
        if tried and all(tried):
            raise NotReady(f"The hosts of this cluster and this one don't trust each other: {tried[0]}. {_HINT}")

    async def _refusal(self, host: Host) -> str:
        """Why that host and this one can't talk; empty where they can, or nobody knows."""
        try:
            async with asyncio.timeout(_SECONDS):
                await self.connections.ask(host, HELLO_PATH)
        except (NotTrusted, HungUp) as error:
            log.warning("host_not_trusted", host=host.id, url=host.url, error=str(error))
            return "" if isinstance(error, Expired) else f"{host.url}: {str(error).rstrip('.')}"
        except _NO_ANSWER as error:
            _log_no_answer(host, error)
        return ""

    def _others(self) -> Sequence[Host]:
        """Those that are there and listen."""
        return [host for host in self._homes.hosts.values() if host.url and host.id != self._homes.host_id]

    async def room(self, host: Host, packages: str | None = None) -> JsonObject | None:
        """See moves.Others."""
        query = "" if packages is None else f"packages={quote(packages, safe='')}"
        return await self._ask(host, _ROOM_PATH, query, _ROOM_SECONDS)

    async def look_for_setups(self, host: Host) -> None:
        """See moves.Others."""
        await self._ask(host, _SETUPS_PATH)

    async def _ask(self, host: Host, path: str, query: str = "", seconds: float = _SECONDS) -> JsonObject | None:
        """What a host answers; None where that is nothing of use."""
        try:
            async with asyncio.timeout(seconds):
                return await self.connections.ask(host, path, query)
        except _NO_ANSWER as error:
            _log_no_answer(host, error)
            return None


def _parameter(scope: Scope, name: str) -> str:
    """A parameter of a question; empty where it isn't given."""
    query: bytes = scope["query_string"]
    return parse_qs(query.decode("latin-1")).get(name, [""])[0]


def _log_no_answer(host: Host, error: Exception) -> None:
    log.info("host_not_asked", host=host.id, url=host.url, error=str(error) or type(error).__name__)


def other_hosts(settings: Settings, homes: Homes | None) -> OtherHosts | None:
    """The other hosts of the cluster; None outside of one. Raises NotReady where TLS can't be had."""
    if homes is None or settings.cluster_secret is None:
        return None
    hops = Hops(settings.cluster_secret.get_secret_value(), homes, settings)
    return OtherHosts(homes, hops, HostConnections(hops, host_tls(settings)))
