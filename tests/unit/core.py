"""The core, where all is real but the sandboxes: those are the fake driver's, which passes the suite of all drivers."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from era.core.concurrency.shares import Shares
from era.core.concurrency.turns import Liveness, Turns
from era.core.execution.active_runs import ActiveRuns
from era.core.execution.run_messages import Collected, ExecuteRequest, RunEvent, RunRequest, RunResult
from era.core.execution.transcript import Piece
from era.core.limits import Rules
from era.core.live.checkpoints import Checkpoints
from era.core.live.contexts import Contexts
from era.core.live.live_sessions import LiveParts, LiveSessions
from era.core.live.session_processes import SessionProcesses
from era.core.metadata import Retention
from era.core.models import Claim, JsonObject, Language, NewSession, OwnedId, RunRecord, Session, WantedIsolation
from era.core.owners.quotas import Quotas
from era.core.pool.admission import Admission
from era.core.pool.pool import SandboxPool
from era.core.ports import ALONE, RunEgress, Sandbox
from era.core.program import Limits
from era.core.runs.outputs import History, Outputs
from era.core.runs.runs import Runs
from era.core.runs.session_run import RunParts
from era.core.secrets import Secret
from era.core.sessions.expiry import Expiry
from era.core.sessions.idempotency import IdempotencyKeys
from era.core.sessions.sessions import Sessions
from era.core.sessions.versions import HistoryBound
from era.core.telemetry import Note, ignore
from era.core.trees.live_snapshots import LiveSnapshots
from era.core.trees.snapshots import Snapshots
from era.errors import SandboxFailed
from era.network.egress import SandboxNetwork
from era.network.policy import Policy
from era.network.storage import StorageListeners
from era.store.blobs.blobs import LocalBlobs
from era.store.metadata import SqlStore
from tests.drivers.fake import FakeDriver, FakeSandbox
from tests.drivers.sandboxes import LIMITS
from tests.owners import mine

URL = "http://era.test"
SETTINGS = NewSession(mine("s"), "python", True, "{}", {}, False, False, 10.0)


class Driver(FakeDriver):
    """The fake driver, some of whose sandboxes die before a program begins in them."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, LIMITS, cgroup_name="")
        self.made: list[FakeSandbox] = []
        self.dead_on_arrival = 0
        """So many of the next sandboxes are dead when they are used."""

        self.refusals = 0
        """So many of the next sandboxes can't be made."""

    async def create(
        self, language: Language, limits: Limits, package_set: str | None = None, heir_to: Sandbox | None = None
    ) -> FakeSandbox:
        if self.refusals:
            self.refusals -= 1
            raise SandboxFailed("no sandbox today")
        sandbox = await super().create(language, limits, package_set)
        if self.dead_on_arrival:
            self.dead_on_arrival -= 1
            sandbox.kill()
        self.made.append(sandbox)
        return sandbox

    @property
    def alive(self) -> list[Sandbox]:
        return [sandbox for sandbox in self.made if sandbox.alive]


class Drivers:
    """Every isolation is the fake driver's."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    async def get(self, isolation: WantedIsolation) -> Driver:
        return self.driver


class Packages:
    """Installed packages, all of which are here."""

    def __init__(self) -> None:
        self.needed: list[str] = []

    async def ensure(self, digest: str) -> None:
        self.needed.append(digest)


class Network(SandboxNetwork):
    """The real one, which notes what it was asked for. The fake driver's sandboxes have no egress by it."""

    def __init__(self) -> None:
        super().__init__(Shares(1000), Policy())
        self.asked: list[tuple[bool, JsonObject, Sequence[Secret]]] = []

    def run_egress(
        self, sandbox: Sandbox, *, owner: str, internet: bool, egress: JsonObject, secrets: Sequence[Secret] = ()
    ) -> RunEgress:
        self.asked.append((internet, egress, secrets))
        return super().run_egress(sandbox, owner=owner, internet=internet, egress=egress, secrets=secrets)


class Core:
    """The parts that runs need, in a directory. `opened` makes one."""

    def __init__(
        self,
        directory: Path,
        *,
        max_warm: int | None = 4,
        spares: int = 0,
        idle_seconds: float = 60.0,
        history_bytes: int = 0,
        processors: int | None = None,
        kept_bytes: int = 0,
        keep_alive: float = 60.0,
        checkpoint_seconds: float = 60.0,
        quotas: dict[str, int] | None = None,
        note: Note = ignore,
        url: str | None = None,
    ) -> None:
        """`url` is that of another database than one of SQLite in the directory."""
        self.directory = directory
        self.store = SqlStore(url or f"sqlite:///{directory}/era.sqlite", Retention())
        self.blobs = LocalBlobs(directory / "blobs")
        self.snapshots = Snapshots(self.blobs)
        (directory / "aside").mkdir(exist_ok=True)
        self.moments = LiveSnapshots(self.snapshots, directory / "aside")
        self.outputs = Outputs(self.blobs, kept=10)
        self.driver = Driver(directory / "sandboxes")
        self.packages = Packages()
        self.rules = Rules(LIMITS, replace(LIMITS, files=100_000))
        self.liveness = Liveness()
        self.pool = SandboxPool(
            Drivers(self.driver),
            self.snapshots,
            self.packages.ensure,
            rules=self.rules,
            liveness=self.liveness,
            spares=spares,
            max_warm=max_warm,
            idle_seconds=idle_seconds,
            kept_bytes=kept_bytes,
            note=note,
        )
        self.network = Network()
        self.turns = Turns(max_waiting=8)
        self.key_quotas: dict[str, dict[str, int]] = {}
        self.quotas = Quotas(self.store.usage, quotas or {}, lambda key_id: self.key_quotas.get(key_id, {}))
        self.store.bounds = self.quotas.bounds
        self.idempotency = IdempotencyKeys(self.store)
        self.active_runs = ActiveRuns()
        self.history = History(self.store, self.outputs, self.active_runs)
        self.setup_may_end = asyncio.Event()
        """When it is set, whoever waits for a setup is told that it has ended."""

        self.checkpoints = Checkpoints(
            self.store,
            self.pool,
            self.turns,
            self.moments,
            HistoryBound(self.store, self.snapshots, self.rules, history_bytes),
        )
        self.live_sessions = LiveSessions(
            LiveParts(
                self.store,
                self.pool,
                self.turns,
                self.active_runs,
                self.network,
                StorageListeners(_no_storage),
                self.checkpoints,
                self._setup_ended,
                self.quotas,
                self.rules,
            ),
            keep_alive=keep_alive,
            checkpoint_seconds=checkpoint_seconds,
        )
        self.contexts = Contexts(self.live_sessions, self.store)
        self.admission = Admission(processors)
        self.runs = Runs(
            RunParts(
                self.store,
                self.pool,
                self.network,
                StorageListeners(_no_storage),
                self.snapshots,
                self.outputs,
                HistoryBound(self.store, self.snapshots, self.rules, history_bytes),
                self.liveness,
                self.contexts,
                self.moments,
                self.quotas,
                self.store.usage,
                self.rules,
                note,
            ),
            self.turns,
            self.idempotency,
            self.active_runs,
            self._setup_ended,
            self.admission,
        )

        self.expiry = Expiry(self.store, self.pool, ALONE, self.quotas)
        self.sessions = Sessions(
            self.store,
            self.pool,
            self.turns,
            self.idempotency,
            self.expiry,
            self.rules,
            self.liveness,
            lambda: None,
        )
        self.processes = SessionProcesses(self.live_sessions, self.store, self.idempotency)

    @classmethod
    @asynccontextmanager
    async def opened(cls, directory: Path, template: Path | None, **options: Any) -> AsyncIterator[Core]:
        """`template` is an empty database with all its tables, since to make those takes a while."""
        if template is not None:
            shutil.copy(template, directory / "era.sqlite")
        core = cls(directory, **options)
        core.blobs.open()
        await core.store.open()
        core.live_sessions.start()
        try:
            yield core
        finally:
            await core.live_sessions.stop(5)
            await core.pool.stop()
            await core.live_sessions.close()
            await core.runs.close(10)
            await core.driver.stop()
            core.network.stop()
            core.blobs.close()
            await core.snapshots.close()
            await core.store.close()

    async def _setup_ended(self, session_id: OwnedId, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self.setup_may_end.wait()
        except TimeoutError:
            return False
        return True

    async def session(self, session_id: str = "s", **fields: Any) -> Session:
        """A new session. Nothing of it is usual but its being Python's and persistent."""
        return await self.store.create_session(replace(SETTINGS, id=mine(session_id), **fields))

    async def run(self, code: str | None = None, session_id: str = "s", **fields: Any) -> Ran:
        return await _read(await self.runs.run(mine(session_id), request(code, **fields)))

    async def execute(self, code: str, **fields: Any) -> Ran:
        given: dict[str, Any] = {"env": {}, "timeout": None, "files": {}, **fields}
        return await _read(await self.runs.execute(ExecuteRequest("default", URL, "python", code, **given)))

    def idle(self) -> list[int]:
        """The keys of sessions that have a sandbox or a kept directory, and use it for nothing now."""
        return [key for key in self.pool.session_keys() if not self.pool.is_busy(key)]

    async def output(self, run_id: str, session_id: str = "s") -> bytes:
        """A run's stdout, as far as it has come."""
        with closing(await self.history.output(mine(session_id), run_id, "stdout")) as written:
            return await written.whole()

    async def record(self, run_id: str, session_id: str = "s") -> RunRecord:
        return await self.history.get(mine(session_id), run_id)

    async def records(self, session_id: str = "s") -> list[RunRecord]:
        """Of all the session's runs, oldest first."""
        return list(reversed(await self.history.list(mine(session_id), limit=100, before=None)))

    async def ended_record(self) -> RunRecord:
        """The record of the last run of "s", once it says that this has ended."""
        async with asyncio.timeout(20):
            while (record := (await self.records())[-1]).status == "running":  # noqa: ASYNC110  nothing tells of it
                await asyncio.sleep(0.05)
        return record

    def claim(self, key: str, body: JsonObject | None = None, hidden: Any = None) -> Claim:
        return self.idempotency.claim("run", key, body or {}, hidden)

    def paused(self, name: str = "go") -> tuple[str, Path]:
        """Code that says "paused" and waits, and the file whose being there lets it go on."""
        go = self.directory / name
        code = f"import os, time\nprint('paused')\nwhile not os.path.exists({str(go)!r}):\n    time.sleep(0.005)\n"
        return code, go


@dataclass(frozen=True)
class Ran:
    """A run with its output."""

    result: RunResult
    stdout: bytes
    stderr: bytes


async def _read(run: Collected) -> Ran:
    with closing(run):
        return Ran(run.result, await run.stdout.whole(), await run.stderr.whole())


def _no_storage(owner: str, sandbox_id: str) -> Any:
    raise AssertionError("no sandbox here has access to the storage")


def request(code: str | None = None, **fields: Any) -> RunRequest:
    return RunRequest(URL, code, **fields)


async def until(condition: Callable[[], Any]) -> None:
    """Wait for what nothing tells of."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  nothing tells of it
            await asyncio.sleep(0.005)


class Listener:
    """Reads the events of a stream as they come."""

    def __init__(self, events: AsyncIterator[RunEvent]) -> None:
        self.events: list[RunEvent] = []
        self._events = events
        self._heard = asyncio.Condition()
        self.task = asyncio.create_task(self._listen())

    async def _listen(self) -> RunResult:
        async for event in self._events:
            async with self._heard:
                self.events.append(event)
                self._heard.notify_all()
        result = self.events[-1]
        assert isinstance(result, RunResult)
        return result

    @property
    def output(self) -> str:
        return b"".join(event.data for event in self.events if isinstance(event, Piece)).decode()

    async def wait_for_output(self, text: str) -> None:
        """Wait until the program has written this."""
        async with asyncio.timeout(60), self._heard:
            await self._heard.wait_for(lambda: text in self.output)
