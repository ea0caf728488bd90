"""The client of one server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from era.sdk.aio.connection import AsyncConnection
from era.sdk.aio.keys import AsyncKeys, AsyncOwners
from era.sdk.aio.runs import AsyncExecuteStream
from era.sdk.aio.sessions import AsyncSession, AsyncSessions
from era.sdk.aio.storage import AsyncStorage
from era.sdk.aio.streams import AsyncEventStream
from era.sdk.aio.webhooks import AsyncWebhooks
from era.sdk.answers import AuditEntry, DayOfUsage, ExecuteResult, Language, Owner, RunRecord
from era.sdk.calls import Call
from era.sdk.options import run_body, run_seconds
from era.sdk.sugar import AsyncOpening, async_opened

if TYPE_CHECKING:
    from typing import Unpack

    from era.sdk.options import ExecuteOptions, NewSession

_DEFAULT_SECONDS = 30.0


class AsyncEra:
    """A client of an ERA server. Close it when it is no longer needed, or use it as a context manager.

    Parameters
    ----------
    url
        The server's address. Default: ERA_URL, else ERA_SERVER, else http://127.0.0.1:8787.
    api_key
        Default: ERA_API_KEY.
    timeout
        Seconds that an answer may take. A run's may take twice as long as the run besides.
    connect_timeout
        Seconds that connecting may take.
    retries
        How often a call is made again if that is safe: nothing was sent, the server said when to come back, or it only
        reads or has an idempotency key. Attempts that wait for a restarting server don't count: they go on for
        `timeout` seconds.
    idempotency_keys
        Whether runs and new sessions get such a key by themselves. Without, a run is a little faster, since with a key
        its record is durable before it begins; but whether it was done is not known where a connection breaks.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        connect_timeout: float = 10.0,
        retries: int = 3,
        idempotency_keys: bool = True,
    ) -> None:
        self._connection = connection = AsyncConnection(
            url, api_key, timeout, connect_timeout, retries, idempotency_keys
        )
        self.url = connection.url
        self.sessions = AsyncSessions(connection)
        self.storage = AsyncStorage(connection)
        self.keys = AsyncKeys(connection)
        self.owners = AsyncOwners(connection)
        self.webhooks = AsyncWebhooks(connection)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close its connections. Sessions and runs stay."""
        await self._connection.close()

    def session(
        self, language: str, id: str | None = None, **options: Unpack[NewSession]
    ) -> AsyncOpening[AsyncSession]:
        """Make a session. It stays, as its data and files do, until it is deleted.

        A `with` block deletes it at its end if it was made without an id; one with an id is kept. Options: `data`,
        `metadata`, `setup`, `persistent`, `default_timeout`, `ttl`, `limits`, `isolation`, `allow_internet`, `egress`,
        `allow_public`, `service`, `storage`, `record_code`.
        """
        return async_opened(self.sessions.create(language, id, **options))

    async def execute(self, language: str, code: str | None = None, **options: Unpack[ExecuteOptions]) -> ExecuteResult:
        """Run code once, without a session: nothing of it is kept.

        Options: `command` in place of code, `args`, `stdin`, `cwd`, `env`, `secrets`, `timeout`, `files`,
        `allow_internet`, `limits`, `isolation`.
        """
        return ExecuteResult(await self._connection.call(self._execution(language, code, options)))

    async def stream(
        self, language: str, code: str | None = None, **options: Unpack[ExecuteOptions]
    ) -> AsyncExecuteStream:
        """`execute`, with its output as it comes: an iterator of events, and the result at its end. Closing it ends the
        program."""
        call = self._execution(language, code, options)
        call.headers["Accept"] = "text/event-stream"
        stream = AsyncEventStream(self._connection, None, await self._connection.open(call), last="done")
        return AsyncExecuteStream(stream)

    def _execution(self, language: str, code: str | None, options: ExecuteOptions) -> Call:
        given = {"language": language, **run_body(code, options)}
        seconds = run_seconds(given, _DEFAULT_SECONDS) + self._connection.timeout
        return Call("POST", "/api/execute", json=given, seconds=seconds)

    async def runs(
        self,
        limit: int | None = None,
        *,
        session: str | None = None,
        status: str | None = None,
        since: str | None = None,
    ) -> list[RunRecord]:
        """Records of runs of all sessions, newest first; `since` is a time (RFC 3339)."""
        query = {"session": session, "status": status, "since": since}
        return RunRecord.each(await self._connection.pages("/api/runs", "runs", limit, query))

    async def quotas(self) -> Owner:
        """The quotas of this client's owner, and how much is used of each; `key` has those of its API key."""
        return Owner(await self._connection.get("/api/quotas"))

    async def usage(
        self, *, owner: str | None = None, since: str | None = None, until: str | None = None
    ) -> list[DayOfUsage]:
        """What was used on each day from `since` to `until` (dates such as 2026-01-31), newest first. `owner` is for
        the operator, who sees all owners without it."""
        answer = await self._connection.get("/api/usage", owner=owner, since=since, until=until)
        return DayOfUsage.each(answer["usage"])

    async def audit(
        self,
        limit: int | None = None,
        *,
        action: str | None = None,
        target: str | None = None,
        owner: str | None = None,
        since: str | None = None,
        until: str | None = None,
    ) -> list[AuditEntry]:
        """Who did what, newest first: with the keys of this client's owner, or for the operator with all. `target` is
        the id of what it was done to; `since` and `until` are times (RFC 3339)."""
        query = {"action": action, "target": target, "owner": owner, "since": since, "until": until}
        return AuditEntry.each(await self._connection.pages("/api/audit", "entries", limit, query))

    async def languages(self) -> list[Language]:
        """The languages that the server knows."""
        return Language.each((await self._connection.get("/api/languages"))["languages"])

    async def health(self) -> dict[str, Any]:
        """Whether the server works, and what isolation it gives."""
        health: dict[str, Any] = await self._connection.get("/health")
        return health

    async def server(self) -> dict[str, Any]:
        """The limits in force on the server, and what its machine has and lacks; for the operator only."""
        server: dict[str, Any] = await self._connection.get("/api/server")
        return server

    async def hosts(self) -> list[dict[str, Any]]:
        """The hosts of a cluster and how each is, also those that died within the last hour; for the operator only.
        None outside of one."""
        answer: dict[str, Any] = await self._connection.get("/api/hosts")
        return list(answer["hosts"])
