"""Setups: what sessions have installed before they run anything.

Theory of operation. A session's row says what is to be installed (`setup`), how far that is (`setup_status`) and, once
it has ended, how it went (`setup_result`) and what came of it (`package_set`). Whoever changes `setup` makes it
`pending` in the same transaction. One task looks for rows that are `pending` or `running` and sees to them; that is
also how a setup that was cut off by the end of the service is taken up again.

After the packages come the setup's commands (commands.py). A setup ends in one transaction, with what its commands have
left as a version, and only if the row still asks for the same: one that was changed meanwhile has a job
of its own. Beginning a run fails where a setup is under way, so the store is where a run and a setup meet; the run then
waits here and tries again. After a failed setup the session is what it was without one.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace

import structlog

from era.core import jsontext
from era.core.metadata import MetadataStore, SetupJob
from era.core.models import OwnedId, Session
from era.core.setup import locks
from era.core.setup.builds import Builds
from era.core.setup.commands import Commanded, Commands
from era.core.setup.package_sets import InstalledPackageSets, Installer, PackageSet, SetupFailed
from era.core.setup.progress import Line, Progress
from era.core.setup.requirements import Packages, commands, lists, wanted
from era.core.turns import Turns
from era.errors import BadRequest, EraError, NoIsolation, NotFound, SandboxFailed

log = structlog.get_logger()

UNDER_WAY = ("pending", "running")

_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 3600.0
"""For so long an package_set stays that no row names: one may be about to."""


class Setups:
    """`start` before anything, `stop` when done."""

    def __init__(
        self,
        store: MetadataStore,
        installer: Installer,
        package_sets: InstalledPackageSets,
        turns: Turns,
        builds: Builds,
        commands: Commands,
        seconds: float,
    ) -> None:
        """`seconds` is how long the commands of a setup may take together."""
        self._builds = builds
        self._commands = commands
        self._seconds = seconds
        self._in_session = Turns()
        self._progress: dict[SetupJob, Progress] = {}
        self._store = store
        self._installer = installer
        self._package_sets = package_sets
        self._turns = turns
        self._wake = asyncio.Event()
        self._news = asyncio.Event()
        """Set when some setup is taken up or has ended, and then replaced."""

        self._anew: set[int] = set()
        self._active_runs: dict[SetupJob, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    async def start(self) -> None:
        """Take up what an earlier process left."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End what is under way, to be taken up at the next start. No run waits any longer."""
        self._stopped = True
        self._tell()
        for progress in self._progress.values():
            progress.end()
        tasks = [*self._active_runs.values(), *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def kick(self) -> None:
        """There is something to do."""
        self._wake.set()

    async def again(self, session_id: OwnedId) -> Session:
        """Install anew what the session asks for, unless that is under way. Waits for a run under way. Raises
        BadRequest where it asks for nothing."""
        async with self._turns.take(session_id):
            session = await self._store.session(session_id)
            if session.setup is None:
                raise BadRequest(
                    f"Session '{session_id}' has no setup.",
                    hint="PATCH /api/sessions/{id} with a 'setup' gives it one.",
                )
            if session.setup_status not in UNDER_WAY:
                self._anew.add(session.key)
                session = await self._store.set_up_again(session_id)
                self.kick()
            return session

    async def settled(self, session_id: OwnedId, seconds: float) -> bool:
        """Wait until the session's setup has ended, at most so long; whether it has."""
        self.kick()
        deadline = time.monotonic() + seconds
        while not self._stopped:
            news = self._news
            if (await self._store.session(session_id)).setup_status not in UNDER_WAY:
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, _LOOK_SECONDS)):
                    await news.wait()
        return False

    async def events(self, session_id: OwnedId) -> AsyncIterator[Session | Line]:
        """The session when its setup begins, changes or has ended, and the lines that it says meanwhile, from the first
        that is kept. The last event is the session with no setup under way. Raises BadRequest where it has none."""
        status: str | None = None
        while True:
            news = self._news
            session = await self._store.session(session_id)
            if session.setup is None:
                raise BadRequest(
                    f"Session '{session_id}' has no setup.",
                    hint="PATCH /api/sessions/{id} with a 'setup' gives it one.",
                )
            if session.setup_status not in UNDER_WAY or self._stopped:
                yield session
                return
            if status != session.setup_status:
                status = session.setup_status
                yield session
            progress = self._progress.get(SetupJob(session.key, session.owned_id, session.setup, session.setup_lock))
            if progress is not None:
                async for event in progress.follow():
                    if isinstance(event, Line):
                        yield event
                    elif status != "running":
                        status = "running"
                        yield replace(session, setup_status="running")
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await news.wait()

    async def package_set(self, session_id: OwnedId) -> tuple[Session, PackageSet | None]:
        """What the session's programs have besides their language."""
        session = await self._store.session(session_id)
        if session.package_set is None:
            return session, None
        await self._package_sets.ensure(session.package_set)
        return session, self._installer.get(session.package_set)

    async def sweep(self) -> None:
        """Remove the package_sets that no session needs, also none that can still be restored."""
        needed = set(await self._store.package_sets())
        gone = await asyncio.to_thread(self._installer.sweep, needed, time.time() - _GRACE_SECONDS)
        if gone:
            log.info("package_sets_removed", count=gone)

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                for job in await self._store.setups_to_do():
                    if job not in self._active_runs:
                        for other, task in self._active_runs.items():
                            if other.session_key == job.session_key:
                                task.cancel()  # it isn't wanted any more
                        self._progress[job] = Progress()
                        task = self._active_runs[job] = asyncio.create_task(self._do(job))
                        task.add_done_callback(lambda _, job=job: self._over(job))  # type: ignore[misc]  # bound now
                        self._tell()  # who follows it can do so from here on, and would miss its lines else
            except EraError as error:
                log.warning("setups_not_found", error=error.message)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._wake.wait()

    def _over(self, job: SetupJob) -> None:
        self._progress.pop(job).end()
        del self._active_runs[job]

    async def _begin(self, job: SetupJob, progress: Progress) -> None:
        await self._store.begin_setup(job)
        progress.began()

    async def _do(self, job: SetupJob) -> None:
        async with self._in_session.take(str(job.session_key), bounded=False):
            await self._set_up(job)

    async def _session(self, job: SetupJob) -> Session:
        """Raises NotFound where it is gone, or has another job by now."""
        session = await self._store.session(job.session_id)
        if (session.key, session.setup) != (job.session_key, job.setup):
            raise NotFound(f"The setup of session '{job.session_id}' is another one by now.")
        return session

    async def _installed(self, job: SetupJob, packages: Packages, anew: bool, progress: Progress) -> PackageSet:
        """The packages of a setup, in the versions of its lock if that can be. Raises SetupFailed."""
        build = self._builds.of(await self._session(job))

        async def installed(packages: Packages) -> PackageSet:
            made = await self._installer.make(packages, build, anew=anew, say=progress.say)
            progress.flush()
            return made

        if job.lock is None:
            return await installed(packages)
        lock = json.loads(job.lock)
        try:
            made = await installed(locks.pinned(packages, lock))
            other = locks.differences(lock, {kind: getattr(made, kind) for kind in locks.KINDS})
        except SetupFailed as problem:
            made = await installed(packages)
            other = f"they can't be installed any more. {problem}"
        if not other:
            return made
        told = f"These aren't all the very packages that the session had where its capsule was made: {other}"
        return replace(made, stderr=_joined(told, made.stderr))

    async def _set_up(self, job: SetupJob) -> None:
        progress = self._progress[job]
        anew = job.session_key in self._anew
        begun = time.monotonic()
        package_set: PackageSet | None = None
        error: str | None = None
        stdout = stderr = ""
        commanded = Commanded()
        session: Session | None = None
        try:
            packages = wanted(json.loads(job.setup))
            if packages:
                package_set = None if anew or job.lock else self._installer.known(packages, str(job.session_key))
                if package_set is None:
                    await self._begin(job, progress)
                    begun = time.monotonic()
                    package_set = await self._installed(job, packages, anew, progress)
                stdout, stderr = package_set.stdout, package_set.stderr
            if asked := commands(job.setup):
                await self._begin(job, progress)
                session = await self._session(job)
                commanded = await self._commands.run(
                    session,
                    asked,
                    package_set.digest if package_set else None,
                    time.monotonic() + self._seconds,
                    progress,
                )
                error = commanded.error
        except SetupFailed as problem:
            error, stdout, stderr = str(problem), problem.stdout, problem.stderr
        except BadRequest as problem:
            error = problem.message
        except NotFound:
            return  # its session is gone
        except (NoIsolation, SandboxFailed) as problem:  # no sandbox for its code, and there won't be one soon
            error = f"{problem.message} {problem.hint}".rstrip()
        except EraError as problem:
            log.warning("setup_put_off", session=job.session_key, error=problem.message)
            return
        except Exception as problem:
            log.error("setup_failed", session=job.session_key, exc_info=problem)
            error = "The service failed; its log says why."
        result = {
            "success": error is None,
            "duration_ms": int((time.monotonic() - begun) * 1000),
            **lists(
                pip=[f"{item['name']}=={item['version']}" for item in package_set.pip] if package_set else (),
                npm=[f"{item['name']}@{item['version']}" for item in package_set.npm] if package_set else (),
                go=[f"{item['name']}@{item['version']}" for item in package_set.go] if package_set else (),
                commands=commanded.ran,
            ),
            "error": error,
            "stderr": _joined(stderr, commanded.stderr),
            "stdout": _joined(stdout, commanded.stdout),
        }
        left = None if session is None or commanded.snapshot is None else (session.version, commanded.snapshot)
        try:
            recorded = await self._store.end_setup(
                job,
                status="completed" if error is None else "failed",
                result=jsontext.compact(result),
                package_set=package_set.digest if package_set and error is None else None,
                left=left,
            )
            if session is not None and left is not None and recorded:
                await self._commands.kept(session, left[1])
            elif session is not None:
                await self._commands.dropped(session.key)
            self._anew.discard(job.session_key)
        except EraError as problem:
            log.warning("setup_not_recorded", session=job.session_key, error=problem.message)
        self._tell()


def _joined(first: str, second: str) -> str:
    return "\n".join(part for part in (first, second) if part)
