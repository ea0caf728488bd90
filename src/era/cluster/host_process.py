"""A host's process on this machine: its settings; started, watched, started anew when it ends, stopped.

Theory of operation. The process is `era serve` with a host's settings. It is no child of whoever watches over it, and
outlives it: a note in the host's data directory says which process it is, and the next watcher adopts that. Where the
note is missing or wrong, it is the process with the same command that holds the directory's lock. Ownership of sessions
has nothing to do with any of this. That is in the database, and a second process on the same data directory would end
by itself, since the first one holds the lock.

Nothing here waits. `look` is called again and again by whoever watches (ray_hosts.py), and does what is due.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Literal

import httpx

from era.errors import NotReady

State = Literal["starting", "ready", "unready", "failing", "stopping", "stopped", "drained"]
"""`unready`: it serves, and can't take runs now. `failing`: it ended before it served, and is tried again.
`drained`: it is stopped, and stays so until it is told to start, whoever watches over it."""

NOTE = "host-process.json"
LOG = "host.log"

SERVE = (sys.executable, "-m", "era.client.cli", "serve")

_AGAIN_SECONDS = 1.0
"""Least time between two starts; doubled with each that fails."""

_MOST_AGAIN_SECONDS = 30.0
_STOP_SECONDS = 75.0
"""What a host may take to end besides its two times to drain: twice server.LAST_ANSWERS_SECONDS, 20 for the ends of
processes, 5 for deliveries, and some for all else. One that takes longer is killed."""

_HEALTH_SECONDS = 2.0
_HUNG_SECONDS = 60.0
"""Without any answer to GET /ready. Its lease was over long before, so others have its sessions by then."""

_PIECE = 1 << 16
_LOG_BYTES = 64 << 20
"""A log that is larger when a process starts is put aside, in the place of the one put aside before."""

_LAUNCH = """
import subprocess, sys
with open(sys.argv[1], "ab") as log:
    process = subprocess.Popen(
        sys.argv[2:], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    print(process.pid)
    process.returncode = 0  # so that the end of this process, which comes now, complains about nothing
"""


@dataclass(frozen=True, slots=True)
class HostStatus:
    """What is known of a node's host."""

    state: State
    url: str = ""
    """Where it serves; empty as long as it doesn't."""

    pid: int = 0
    restarts: int = 0
    """How often it was started anew since this watcher began."""

    detail: str = ""
    """Why it isn't ready, for people."""

    places: int = 0
    """How many sessions may have a sandbox there; 0 where that isn't known."""

    taken: int = 0
    """How many have one, or wait for one."""


@dataclass(slots=True)
class _Note:
    """Which process it is, so that another watcher finds it, and what that must know of it."""

    pid: int = 0
    begun: int = 0
    """When the process began, in the kernel's ticks since boot: process ids come again."""

    url: str = ""
    log_from: int = 0
    """Where in the log its process begins."""

    drained: bool = False
    stop_seconds: float = 0.0
    """How long the process may take to end, by the environment that it was started with; 0 where that isn't known."""

    stop_until: float = 0.0
    """Until when it may do so, by the kernel's monotonic clock, which is the same for all processes; 0 as long as it
    isn't told to end."""


class HostProcess:
    """One host on this machine, with its data directory and the log in it."""

    def __init__(
        self, data_dir: Path, environment: Mapping[str, str] | None = None, command: Sequence[str] = SERVE
    ) -> None:
        """`environment` is that of the process, which prints `ERA serves URL` once it serves; None if it isn't known
        yet, so that only a host that runs already can be watched, and stopped. Raises OSError."""
        self.data_dir = data_dir
        self._command = command
        self._environment = environment
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._note = _read(data_dir / NOTE)
        self._searched = self._note.log_from
        """Up to where its log doesn't say where it serves."""

        self._adopt()
        self._kill_at: float | None = self._note.stop_until or None
        self._wanted = not self._note.drained and self._kill_at is None
        self._ready = False
        self._detail = ""
        self._places = self._taken = 0
        self._failures = 0
        self._restarts = 0
        self._began_at = -_AGAIN_SECONDS
        self._start_at = 0.0
        self._ask_at = 0.0
        self._answered_at = time.monotonic()

    def status(self) -> HostStatus:
        """What the last `look` found."""
        pid = self._note.pid
        url = self._note.url if pid else ""
        state: State
        if self._kill_at is not None:
            state = "stopping"
        elif pid and url:
            state = "ready" if self._ready else "unready"
        elif pid:
            state = "starting"
        elif self._note.drained:
            state = "drained"
        elif not self._wanted:
            state = "stopped"
        elif self._environment is None:
            return HostStatus("failing", detail="its settings aren't known: `era serve --cluster` tells them")
        else:
            state = "failing" if self._failures else "starting"
        if state == "ready":
            return HostStatus(state, url, pid, self._restarts, places=self._places, taken=self._taken)
        return HostStatus(state, url, pid, self._restarts, self._detail)

    def keep_running(self, environment: Mapping[str, str] | None = None) -> None:
        """Have it run from now on, unless it was drained. A new environment is that of its next process."""
        self._environment = environment or self._environment
        self._wanted = not self._note.drained

    def start(self) -> None:
        """Have it run from now on, also if it was drained. Raises OSError."""
        self._start_at = 0.0
        if self._note.drained:
            self._note.drained = False
            self._write()
        self.keep_running()

    def stop(self, *, drain: bool = False) -> None:
        """Tell it to end: it lets runs end, and gives its sessions to the others at once. With `drain`, keep whoever
        watches next from starting it, too. Raises OSError."""
        self._wanted = False
        if drain and not self._note.drained:
            self._note.drained = True
            self._write()
        if self._note.pid and self._kill_at is None:
            seconds = self._note.stop_seconds or stop_seconds(self._environment or {})
            self._kill_at = time.monotonic() + seconds
            self._signal(signal.SIGTERM)
            self._note.stop_until = self._kill_at
            self._write()  # afterwards, so that a full disk doesn't keep it from ending

    def look(self) -> None:
        """See what has become of it, and do what is due: start, note where it serves, ask whether it is ready, kill.
        Takes a moment, or the two seconds that it has for an answer. Raises OSError."""
        now = time.monotonic()
        if not self._note.pid:
            if self._wanted and self._environment is not None and now >= self._start_at and not self._adopt():
                self._launch(self._environment)
        elif not self._is_running():
            self._ended(now)
        elif self._kill_at is not None:
            if now > self._kill_at:
                self._signal(signal.SIGKILL)
        elif self._note.drained:
            self.stop(drain=True)  # who drained it may have ended before he could tell it
        elif not self._note.url:
            self._find_url()
        elif now >= self._ask_at:
            self._ask()

    def _adopt(self) -> bool:
        """Take the process that holds the data directory's lock for the host, if it has a host's command; a backup may
        have the lock, too. Whether there is one."""
        if self._note.pid or not (pid := _holder(self.data_dir / "lock", self._command[1:])):
            return bool(self._note.pid)
        self._note.pid, self._note.begun, self._note.url = pid, began(pid), ""
        self._note.stop_seconds = self._note.stop_until = 0.0
        self._answered_at = time.monotonic()  # or the first answer that doesn't come would be the end of it
        self._searched = self._note.log_from = self._note.log_from or self._last_start()
        self._write()
        return True

    def _find_url(self) -> None:
        """Look on in the log for where it serves."""
        while not self._note.url and (piece := self._said(self._searched)):
            self._note.url = served_at(piece.decode(errors="replace"))
            if len(piece) < _PIECE:
                break
            self._searched += piece.rfind(b"\n") + 1 or len(piece)
        if self._note.url:
            self._write()

    def _last_start(self) -> int:
        """Where in the log the last process that served says so."""
        try:
            with (self.data_dir / LOG).open("rb") as log, mmap(log.fileno(), 0, access=ACCESS_READ) as content:
                return content.rfind(b"\nERA serves") + 1
        except (FileNotFoundError, ValueError):  # which an empty file raises
            return 0

    def _launch(self, environment: Mapping[str, str]) -> None:
        self._rotate()
        log = self.data_dir / LOG
        self._searched = self._note.log_from = log.stat().st_size if log.exists() else 0
        self._write()  # should this process end before it knows the other
        command = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(log), *self._command]
        done = subprocess.run(command, env=self._own(environment), cwd="/", capture_output=True, text=True, check=False)
        self._began_at = self._answered_at = time.monotonic()
        if done.returncode:
            self._fail(" ".join(done.stderr.split())[-2000:])
            return
        self._note.pid, self._note.url = int(done.stdout), ""
        self._note.begun = began(self._note.pid)
        self._note.stop_seconds = stop_seconds(environment)
        self._write()

    def _own(self, environment: Mapping[str, str]) -> Mapping[str, str]:
        """The process's environment. A port that the system has chosen is kept, so that its clients find it again."""
        port = served_port(self._note.url)
        if environment.get("ERA_PORT") == "0" and port and not self._failures:
            return {**environment, "ERA_PORT": str(port)}
        return environment

    def _ended(self, now: float) -> None:
        was_ready, stopping = bool(self._note.url), self._kill_at is not None
        size = log.stat().st_size if (log := self.data_dir / LOG).exists() else 0
        said = self._said(max(self._note.log_from, size - _PIECE)).decode(errors="replace").strip()
        self._note.pid, self._ready, self._kill_at = 0, False, None
        self._note.stop_until = 0.0
        self._write()
        if stopping:
            self._detail = ""
            return
        self._restarts += 1
        if was_ready:
            self._failures = 0
            self._detail = "it has ended, and is started anew"
            self._start_at = max(now, self._began_at + _AGAIN_SECONDS)
        else:
            self._fail(last_line(said))

    def _fail(self, why: str) -> None:
        """Note that a start came to nothing, and when to try again."""
        self._failures += 1
        self._detail = f"it doesn't start: {why}"
        wait = min(_AGAIN_SECONDS * 2 ** min(self._failures, 10), _MOST_AGAIN_SECONDS)
        self._start_at = time.monotonic() + wait

    def _ask(self) -> None:
        """Ask whether it can take runs; kill it if it hasn't answered anything for a minute."""
        try:
            answer = httpx.get(f"{self._note.url}/ready", timeout=_HEALTH_SECONDS, trust_env=False, verify=False)  # noqa: S501  it is this machine's own
        except httpx.HTTPError as error:
            self._ready, self._detail = False, f"it doesn't answer ({type(error).__name__})"
            if time.monotonic() > self._answered_at + _HUNG_SECONDS:
                self._signal(signal.SIGKILL)
        else:
            self._answered_at = time.monotonic()
            self._ready = answer.status_code == 200
            self._detail = "" if self._ready else f"GET /ready answers {answer.status_code}"
            self._places, self._taken = _load(answer)
        self._ask_at = time.monotonic() + (_HEALTH_SECONDS if self._ready else _HEALTH_SECONDS / 10)

    def _is_running(self) -> bool:
        return self._note.begun != 0 and began(self._note.pid) == self._note.begun

    def _signal(self, number: int) -> None:
        if self._is_running():
            with suppress(ProcessLookupError):
                os.kill(self._note.pid, number)

    def _said(self, start: int) -> bytes:
        """A piece of the log, from there on."""
        try:
            with (self.data_dir / LOG).open("rb") as log:
                log.seek(start)
                return log.read(_PIECE)
        except FileNotFoundError:
            return b""

    def _rotate(self) -> None:
        log = self.data_dir / LOG
        if log.exists() and log.stat().st_size > _LOG_BYTES:
            log.replace(log.with_name(f"{LOG}.1"))

    def _write(self) -> None:
        """Write the note, as a whole or not at all."""
        draft = self.data_dir / f"{NOTE}.new"
        draft.write_text(json.dumps(asdict(self._note)))
        draft.replace(self.data_dir / NOTE)


def _read(file: Path) -> _Note:
    """The note of the watcher before; an empty one where there was none, or its process is gone."""
    try:
        told = json.loads(file.read_text())
        # One of a later version may say more.
        note = _Note(**{each.name: told[each.name] for each in fields(_Note) if each.name in told})
    except (OSError, ValueError, TypeError):
        return _Note()
    if not note.begun or began(note.pid) != note.begun:
        note.pid, note.stop_until = 0, 0.0
    return note


def _holder(lock: Path, arguments: Sequence[str]) -> int:
    """The process with these arguments that has locked this file (directory_locks.py), 0 where none is found."""
    try:
        node = lock.stat()
        held = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return 0
    for pid in {int(each[4]) for each in held if each[1] == "FLOCK" and each[5].rpartition(":")[2] == str(node.st_ino)}:
        process = Path(f"/proc/{pid}")
        with suppress(OSError):  # it may have ended, or be somebody else's
            own = (process / "cmdline").read_bytes().split(b"\0")[1:-1]
            is_host = own == [os.fsencode(each) for each in arguments]
            if is_host and any(_is(each, node) for each in (process / "fd").iterdir()):
                return pid
    return 0


def _is(descriptor: Path, node: os.stat_result) -> bool:
    """Whether a descriptor, which may be closed meanwhile, is of this file."""
    with suppress(FileNotFoundError):
        return os.path.samestat(descriptor.stat(), node)
    return False


def served_by(data_dir: Path) -> tuple[str, int]:
    """Where the host with this data directory serves, and its process, by the watcher's note; or empty and 0."""
    note = _read(data_dir / NOTE)
    return (note.url, note.pid) if note.pid else ("", 0)


def stop_seconds(environment: Mapping[str, str]) -> float:
    """How long a host with this environment may take to end. It says itself if a setting is no number."""
    seconds = _STOP_SECONDS
    for name, default, times in (("ERA_UNREADY_SECONDS", 0.0, 1), ("ERA_DRAIN_SECONDS", 10.0, 2)):
        try:
            seconds += times * float(environment.get(name) or default)
        except ValueError:
            seconds += times * default
    return seconds


def _load(answer: httpx.Response) -> tuple[int, int]:
    """The places for sandboxes that GET /ready tells of, and how many are taken or waited for; zeros where it tells of
    none."""
    try:
        told = answer.json()["sandboxes"]
        return int(told["places"]), int(told["taken"]) + int(told["waiting"])
    except (ValueError, TypeError, KeyError):
        return 0, 0


def began(pid: int) -> int:
    """When this process began, in the kernel's ticks since boot; 0 where there is none, or only what is left of it
    until its parent asks."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()  # its name may be any bytes
    except OSError:
        return 0
    return 0 if fields[0] in b"ZX" else int(fields[19])


def served_at(said: str) -> str:
    """The URL that a server's first lines say it serves at, empty where they don't yet."""
    for line in said.splitlines(keepends=True):
        if line.startswith("ERA serves") and line.endswith("\n"):
            return line.split()[2]
    return ""


def served_port(url: str) -> int:
    """The port in such a URL, 0 where there is none."""
    port = url.rpartition(":")[2]
    return int(port) if port.isdecimal() else 0


def last_line(said: str) -> str:
    """The line that says why a server doesn't start, of all that it said."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("era: ")]
    return (told or lines or ["it said nothing"])[-1][:2000]


_EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104  they are only compared
_PORT = "8787"
_NEEDED = {
    "ERA_DATABASE_URL": "the PostgreSQL database of all hosts",
    "ERA_SHARED_DIR": "the directory that all hosts share",
    "ERA_CLUSTER_SECRET": "the secret by which hosts know each other",
    "ERA_DATA_DIR": "a directory of the host's own",
}
"""What a host must be told, and in which words it is asked for."""


def of_cluster(variables: Mapping[str, str]) -> dict[str, str]:
    """Of these variables, what all hosts of a cluster are to have: settings, and credentials of S3."""
    return {name: value for name, value in variables.items() if name.startswith(("ERA_", "AWS_"))}


def host_environment(cluster: Mapping[str, str], node: Mapping[str, str], address: str) -> dict[str, str]:
    """The environment of the host on a node.

    `cluster` is what all hosts are given, `node` the node's own environment, which goes before it, and `address` where
    other nodes reach this one. What is of Ray, its token too, is no business of a host's. Raises NotReady for what is
    missing, and for a directory that depends on where a process was started.
    """
    found = {**cluster, **{name: value for name, value in node.items() if not name.startswith("RAY_")}}
    for name, what in _NEEDED.items():
        if not found.get(name):
            raise NotReady(f"{name} isn't set: give `era serve --cluster`, or this node, {what}.")
    for name in ("ERA_DATA_DIR", "ERA_SHARED_DIR"):
        if not Path(found[name]).is_absolute():
            raise NotReady(f"{name} is {found[name]}: on the nodes of a cluster it must be an absolute path.")
    found.setdefault("ERA_HOST", address)
    port = found.setdefault("ERA_PORT", _PORT)
    scheme = "http"
    if found.get("ERA_CLUSTER_CERTIFICATE"):
        scheme, port = "https", found.get("ERA_CLUSTER_PORT") or "0"
    if found["ERA_HOST"] in _EVERYWHERE and port != "0":
        found.setdefault("ERA_HOST_URL", f"{scheme}://{f'[{address}]' if ':' in address else address}:{port}")
    return found
