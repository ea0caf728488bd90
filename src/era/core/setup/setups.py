"""Setups: what sessions have installed before they run anything.

Theory of operation. A session's row has what is to be installed (`setup`), the state of that (`setup_status`) and, once
it has ended, how it went (`setup_result`) and the packages it came to (`package_set`). Whoever changes `setup` makes it
`pending` in the same transaction. One task looks for rows that are `pending` or `running`, and starts a job for each;
so a setup that was cut off by the end of the service is taken up again, too.

After the packages come the setup's commands (commands.py). A setup ends in one transaction, which makes a version of
the files that its commands left. It does so only if the row still asks for the same setup: one that was changed
meanwhile has a job of its own. The transaction that begins a run fails while a setup is under way; the run then waits
here and tries again. After a failed setup the session has no packages, or, where the same setup had been done before,
those that it had.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from era.core import jsontext
from era.core.concurrency.event_log import Gap
from era.core.concurrency.turns import Liveness, Turns
from era.core.metadata import MetadataStore, SetupJob
from era.core.models import JsonObject, OwnedId, Session, Snapshot, Trim
from era.core.ports import ALONE, Cluster
from era.core.setup import package_sets
from era.core.setup.commands import Builds, Commands, CommandsResult
from era.core.setup.package_sets import InstalledPackageSets, Installer, PackageSet, SetupFailed
from era.core.setup.progress import Became, Line, Progress
from era.core.setup.requirements import Packages, commands, lists, packages_of
from era.core.telemetry import Note, SetupEnded, ignore
from era.errors import BadRequest, EraError, NoIsolation, NotFound, QuotaReached, SandboxFailed

log = structlog.get_logger()

UNDER_WAY = ("pending", "running")

_LOOK_SECONDS = 1.0
"""How often the store is asked for setups, should `kick` not have been called for one."""

_FIRST_DELAY, _MOST_DELAY = 1.0, 5.0
"""Seconds after which a setup that was put off is tried again. They double each time, since a try takes a sandbox or
asks a registry."""

_MOST_TAKEN = 8
"""Setups under way with which a host of a cluster takes no session for its setup that nobody has."""

_GRACE_SECONDS = 3600.0
_SHORT_GRACE_SECONDS = 60.0
"""A package set that no row names stays for the first time after it was made or found, as another session may want the
same. For the second it stays in any case, and as long as a setup is under way that has made or found it: a row may be
about to name it."""

_OVER_QUOTA = (
    "What the commands left can't be kept: {} Delete what isn't needed any more, or have them leave less, and try "
    "again with POST /api/sessions/{{id}}/setup."
)


type SetupNews = tuple[int, Session | Line | Became] | Gap | Session
"""An event of a setup with its number, numbers that are gone, or a session whose setup this service won't end."""

EVENTS = "events"
"""In a stored result, the number of the last event before the setup's end. Clients don't see it."""

_MOST_NUMBERS = 10_000
"""Sessions of which the number of the last event is remembered."""


@dataclass(slots=True)
class _Done:
    """How far a setup has come."""

    begun: float
    """By the monotonic clock."""

    installed: PackageSet | None = None
    error: str | None = None
    stdout: str = ""
    stderr: str = ""
    ran: CommandsResult = field(default_factory=CommandsResult)
    session: Session | None = None
    """The session in whose sandbox commands run, as it was before them."""

    def result(self) -> JsonObject:
        """The setup's result, as it is stored."""
        installed = self.installed
        return {
            "success": self.error is None,
            "duration_ms": int((time.monotonic() - self.begun) * 1000),
            **lists(
                pip=[f"{item['name']}=={item['version']}" for item in installed.pip] if installed else (),
                npm=[f"{item['name']}@{item['version']}" for item in installed.npm] if installed else (),
                go=[f"{item['name']}@{item['version']}" for item in installed.go] if installed else (),
                commands=self.ran.ran,
            ),
            "error": self.error,
            "stderr": _joined(self.stderr, self.ran.stderr),
            "stdout": _joined(self.stdout, self.ran.stdout),
        }


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A setup that this service does."""

    task: asyncio.Task[None]
    progress: Progress
    begun_at: float
    """When it was taken up, in seconds since 1970."""


class Setups:
    """Sees to the setups of all sessions, in the background from `start` to `stop`."""

    def __init__(
        self,
        store: MetadataStore,
        installer: Installer,
        package_sets: InstalledPackageSets,
        turns: Turns,
        builds: Builds,
        commands: Commands,
        liveness: Liveness,
        seconds: float,
        note: Note = ignore,
        cluster: Cluster = ALONE,
    ) -> None:
        """`turns` are those of runs. `seconds` is how long the commands of a setup may take together."""
        self._cluster = cluster
        self._builds = builds
        self._liveness = liveness
        self._commands = commands
        self._seconds = seconds
        self._note = note
        self._job_turns = Turns()
        """One job per session at a time: one that isn't wanted any more may still be ending."""

        self._last: dict[int, int] = {}
        """By session, the number of the last event of its setups."""

        self._store = store
        self._installer = installer
        self._package_sets = package_sets
        self._turns = turns
        self._wake = asyncio.Event()
        self._news = asyncio.Event()
        """Set when some setup is taken up or has ended, and then replaced."""

        self._anew: set[int] = set()
        """Keys of sessions whose packages are to be installed even if they are known."""

        self._delayed: dict[SetupJob, tuple[float, float]] = {}
        """Of setups that were put off, the moment of the monotonic clock before which they aren't tried again, and the
        last delay."""

        self._jobs: dict[SetupJob, _UnderWay] = {}
        self._installed = asyncio.Event()
        """Set when packages were installed, until the next sweep."""

        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    async def start(self) -> None:
        """Begin with the setups that an earlier process left."""
        self._task = asyncio.create_task(self._run())

    async def stop(self, seconds: float | None = None) -> None:
        """Cancel what is under way; the next start takes it up again. Runs stop waiting for it. Waits so many seconds
        at most, for files may just be put back into a sandbox. May be called again."""
        self._stopped = True
        self._announce()
        for job in self._jobs.values():
            job.progress.end()
        tasks = [*(job.task for job in self._jobs.values()), *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)

    def kick(self) -> None:
        """Look for setups to do now: there may be a new one."""
        self._wake.set()

    async def again(self, session_id: OwnedId) -> Session:
        """Do the session's setup once more, unless it is under way. Waits for the end of a run. Raises BadRequest where
        the session has no setup."""
        async with self._turns.take(session_id):
            session, _ = await self._with_setup(session_id)
            if session.setup_status not in UNDER_WAY:
                self._liveness.check_not(session, "nothing can be installed")
                self._anew.add(session.key)
                session = await self._store.restart_setup(session_id)
                self.kick()
            return session

    async def settled(self, session_id: OwnedId, seconds: float) -> bool:
        """Wait until the session's setup has ended, at most for `seconds`. Returns whether it has.

        Its job may still be about to hand the sandbox on when the row says so, and is waited for as well."""
        self.kick()
        deadline = time.monotonic() + seconds
        while not self._stopped:
            news = self._news
            session = await self._store.session(session_id)
            if session.setup_status not in UNDER_WAY and not self.is_under_way(session.key):
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, _LOOK_SECONDS)):
                    await news.wait()
        return False

    async def events(self, session_id: OwnedId, after: int) -> AsyncGenerator[SetupNews]:
        """Follow a session's setup from behind the event with the number `after`: changes of its status and the lines
        of its output, as far as they are kept, then the session once no setup is under way. A session without a number
        ends what this service is about to stop. Raises NotFound, and BadRequest where the session has no setup, before
        there is any event to wait for.

        Numbers go on from one setup of a session to its next. After a restart of the service in the middle of a setup
        they begin anew; so a number that has not been given yet counts as none."""
        await self._with_setup(session_id)
        return self._events(session_id, after)

    async def _with_setup(self, session_id: OwnedId) -> tuple[Session, str]:
        """The session and its setup. Raises BadRequest where it has none."""
        session = await self._store.session(session_id)
        if session.setup is None:
            raise BadRequest(
                f"Session '{session_id}' has no setup.",
                hint="PATCH /api/sessions/{id} with a 'setup' gives it one.",
            )
        return session, session.setup

    async def _events(self, session_id: OwnedId, after: int) -> AsyncGenerator[SetupNews]:
        """See events."""
        while True:
            news = self._news
            session, setup = await self._with_setup(session_id)
            if session.setup_status not in UNDER_WAY:
                last = json.loads(session.setup_result or "{}").get(EVENTS, 0)
                after = after if after <= last + 1 else 0
                if after < last:
                    yield Gap(after + 1, last)
                if after <= last:
                    yield last + 1, session
                return
            if self._stopped:
                yield session
                return
            job = self._jobs.get(SetupJob(session.key, session.owned_id, setup, session.setup_lock))
            if job is not None:
                progress = job.progress
                after = after if after <= progress.last else 0
                async for event in progress.follow(after):
                    after = event.last if isinstance(event, Gap) else event[0]
                    yield event
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await news.wait()

    async def package_set(self, session_id: OwnedId) -> tuple[Session, PackageSet | None]:
        """The session and the packages that its programs have, None without any. Raises Unavailable where they can't be
        brought back to this machine now."""
        session = await self._store.session(session_id)
        if session.package_set is None:
            return session, None
        await self._package_sets.ensure(session.package_set)
        return session, self._installer.get(session.package_set)

    async def sweep(self) -> None:
        """Remove package sets that no session needs, not even one that is gone but can still be restored."""
        self._installed.clear()
        # Before the rows are read: what a setup has made or found since it began may be named by a row after that.
        free_before = min([time.time(), *(job.begun_at for job in self._jobs.values())]) - _SHORT_GRACE_SECONDS
        needed = set(await self._store.package_sets())
        older_than = min(time.time() - _GRACE_SECONDS, free_before)  # a setup may take longer than that
        removed = await asyncio.to_thread(self._installer.sweep, needed, older_than, free_before)
        if removed:
            log.info("package_sets_removed", count=removed)

    async def has_installed(self) -> None:
        """Wait until packages were installed since the last sweep."""
        await self._installed.wait()

    def is_under_way(self, session_key: int) -> bool:
        """Whether a setup of the session is done here."""
        return any(job.session_key == session_key for job in self._jobs)

    def _announce(self) -> None:
        """Wake those who wait for news of setups."""
        self._news.set()
        self._news = asyncio.Event()

    async def _run(self) -> None:
        """Start a job for each setup that is to be done, and cancel those that were replaced.

        A setup may end while the list that names it is on its way here. Its new job finds that out when it begins."""
        while True:
            self._wake.clear()
            try:
                unfinished = await self._store.unfinished_setups()
                self._delayed = {job: self._delayed[job] for job in unfinished if job in self._delayed}
                jobs = [job for job in unfinished if job not in self._jobs and self._is_due(job)]
                keys = [job.session_key for job in jobs]
                # At least one: or those of sessions that nobody has would wait for as long as there are others.
                owned = set(await self._cluster.owned(keys, max(1, _MOST_TAKEN - len(self._jobs))))
                for job in jobs:
                    if job.session_key in owned:
                        for other, under_way in self._jobs.items():
                            if other.session_key == job.session_key:
                                under_way.task.cancel()  # the session asks for another setup by now
                        progress = Progress(self._last.get(job.session_key, 0))
                        task = asyncio.create_task(self._do(job, progress))
                        self._jobs[job] = _UnderWay(task, progress, time.time())
                        task.add_done_callback(lambda _, job=job: self._forget(job))  # type: ignore[misc]  # bound now
                        self._announce()  # or those who follow the setup would miss its first lines
            except EraError as error:
                log.warning("setups_not_found", error=error.message)
            except Exception:  # it looks again all the same
                log.exception("bug", where="setups")
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._wake.wait()

    def _is_due(self, job: SetupJob) -> bool:
        """Whether a setup may be tried now."""
        return job not in self._delayed or time.monotonic() >= self._delayed[job][0]

    def _put_off(self, job: SetupJob, begun: float, problem: EraError) -> None:
        """Have a setup be tried again, later than the last time."""
        delay = min(2 * self._delayed[job][1], _MOST_DELAY) if job in self._delayed else _FIRST_DELAY
        self._delayed[job] = (time.monotonic() + delay, delay)
        self._tell(job, "put_off", begun, message=problem.message)

    def _forget(self, job: SetupJob) -> None:
        """Forget a job that has ended, and wake those who wait for that."""
        progress = self._jobs.pop(job).progress
        progress.end()
        self._last[job.session_key] = max(self._last.get(job.session_key, 0), progress.last)
        while len(self._last) > _MOST_NUMBERS:
            self._last.pop(next(iter(self._last)))
        self._announce()

    async def _begin(self, job: SetupJob, progress: Progress) -> None:
        """Make the setup `running`, for the row and for those who follow it. Raises NotFound where it has ended."""
        if not await self._store.begin_setup(job):
            raise NotFound(f"The setup of session '{job.session_id}' has ended, or is another one by now.")
        progress.began()

    async def _do(self, job: SetupJob, progress: Progress) -> None:
        """Do a setup once no other job of its session is under way."""
        async with self._job_turns.take(str(job.session_key), bounded=False):
            with ExitStack() as naming:
                await self._set_up(job, progress, naming)

    async def _session(self, job: SetupJob) -> Session:
        """The session of a job. Raises NotFound where it is gone, or asks for another setup by now."""
        session = await self._store.session(job.session_id)
        if (session.key, session.setup) != (job.session_key, job.setup):
            raise NotFound(f"The setup of session '{job.session_id}' is another one by now.")
        return session

    async def _install(self, job: SetupJob, packages: Packages, anew: bool, progress: Progress) -> PackageSet:
        """Install the packages of a setup, in the versions of its lock if they can be had. Raises SetupFailed, also
        where it isn't known whether they can: others would take the lock's place for good."""
        build = self._builds(await self._session(job))

        async def install(packages: Packages) -> PackageSet:
            try:
                made = await self._installer.make(packages, build, anew=anew, say=progress.say)
            finally:
                self._installed.set()
            progress.flush()
            return made

        if job.lock is None:
            return await install(packages)
        lock = json.loads(job.lock)
        try:
            made = await install(package_sets.pinned(packages, lock))
            differences = package_sets.differences(lock, {kind: getattr(made, kind) for kind in package_sets.KINDS})
        except SetupFailed as problem:
            if not problem.no_such:
                raise
            made = await install(packages)
            differences = f"they can't be installed any more. {problem}"
        if not differences:
            return made
        note = f"These aren't all the very packages that the session had where its capsule was made: {differences}"
        return replace(made, stderr=_joined(note, made.stderr))

    async def _set_up(self, job: SetupJob, progress: Progress, naming: ExitStack) -> None:
        """Install the packages, run the commands, and record how it went. Where that can't be recorded, or not be tried
        now, the setup stays under way and is taken up again. `naming` is as for Commands.run."""
        done = _Done(time.monotonic())
        try:
            await self._carry_out(job, done, progress, naming)
        except SetupFailed as problem:
            done.error, done.stdout, done.stderr = str(problem), problem.stdout, problem.stderr
        except BadRequest as problem:
            done.error = problem.message
        except NotFound:
            return  # its session is gone, or the setup has ended
        except (NoIsolation, SandboxFailed) as problem:  # no sandbox for its code, and there won't be one soon
            done.error = f"{problem.message} {problem.hint}".rstrip()
        except EraError as problem:
            self._put_off(job, done.begun, problem)
            return
        except Exception as problem:
            log.error("setup_failed", session=job.session_key, exc_info=problem)
            done.error = "The service failed; its log says why."
        await self._end(job, done, progress)

    async def _carry_out(self, job: SetupJob, done: _Done, progress: Progress, naming: ExitStack) -> None:
        """Install the packages and run the commands, and note in `done` how far that has come. Raises SetupFailed,
        EraError."""
        anew = job.session_key in self._anew
        packages = packages_of(json.loads(job.setup))
        if packages:
            if not anew and not job.lock:
                done.installed = await self._installer.find_installed(packages, str(job.session_key))
            if done.installed is None:
                await self._begin(job, progress)
                done.begun = time.monotonic()
                done.installed = await self._install(job, packages, anew, progress)
                self._anew.discard(job.session_key)  # what puts the rest off has nothing fetched again
            done.stdout, done.stderr = done.installed.stdout, done.installed.stderr
        # What they leave is in the files of a session that is live: only its packages were lost, meanwhile.
        if (to_run := commands(job.setup)) and job.session_key not in self._liveness:
            await self._begin(job, progress)
            done.session = await self._session(job)
            package_set = done.installed.digest if done.installed else None
            deadline = time.monotonic() + self._seconds
            done.ran = await self._commands.run(done.session, to_run, package_set, deadline, progress, naming)
            done.error = done.ran.error

    async def _end(self, job: SetupJob, done: _Done, progress: Progress) -> None:
        """Record how a setup went, and hand its sandbox on to the session's runs if that is what it left."""
        session, ran, result = done.session, done.ran, done.result()
        progress.end()
        result[EVENTS] = progress.last
        left = None if session is None or ran.snapshot is None else (session.version, ran.snapshot)
        kept = False
        try:
            trim = None if session is None else await self._commands.trim(session, ran.snapshot)
            try:
                recorded = await self._record(job, result, done.installed, left, trim)
            except QuotaReached as problem:
                left = None
                result["success"], result["error"] = False, _OVER_QUOTA.format(problem.message)
                recorded = await self._record(job, result, done.installed)
            packages_count = (
                len([*done.installed.pip, *done.installed.npm, *done.installed.go]) if done.installed else 0
            )
            outcome = "completed" if result["success"] else "failed"
            self._tell(job, outcome, done.begun, packages=packages_count, commands=len(ran.ran))
            if session is not None and left is not None and recorded:
                await self._commands.keep(session, left[1])
                kept = True
            self._anew.discard(job.session_key)
            self._last[job.session_key] = progress.last + 1  # the end of the setup is an event, too
        except EraError as problem:
            self._put_off(job, done.begun, problem)
        finally:
            # Also where it isn't recorded, or this job is cancelled: the sandbox would be taken to hold the version in
            # force, and what the commands left would be kept by the next run.
            if session is not None and not kept:
                await self._commands.drop(session.key)
        self._announce()

    async def _record(
        self,
        job: SetupJob,
        result: JsonObject,
        installed: PackageSet | None,
        left: tuple[int, Snapshot] | None = None,
        trim: Trim | None = None,
    ) -> bool:
        """Record the end of a setup with this result; see MetadataStore.end_setup. Raises EraError."""
        return await self._store.end_setup(
            job,
            status="completed" if result["success"] else "failed",
            result=jsontext.compact(result),
            package_set=installed.digest if installed and result["success"] else None,
            left=left,
            trim=trim,
        )

    def _tell(self, job: SetupJob, outcome: str, begun: float, **more: Any) -> None:
        """Note the end of a setup that began at this moment of the monotonic clock."""
        session, seconds = job.session_id, time.monotonic() - begun
        self._note(SetupEnded(session.id, session.owner, outcome, time.time() - seconds, seconds, **more))


def _joined(first: str, second: str) -> str:
    """Two texts, on lines of their own, without empty ones."""
    return "\n".join(part for part in (first, second) if part)
