"""The supervisor: PID 1 of every sandbox. It starts programs, passes on what they print, and ends them.

Theory of operation
===================

*Becoming the program.* The sandbox's first process is `python3 main.py`, with `main.py` not there yet and this
directory on the path. Python imports `sitecustomize` before it looks at `main.py`, and that import runs `serve()`,
which never returns in PID 1. For a run it forks; the child *returns* from `serve()`, and the interpreter goes on with
what it was asked for: it opens `main.py`, makes `__main__`, runs it, finalizes. So the program is a real
`python3 main.py` from argv to exit handlers, with none of our frames beneath it, and yet costs a fork instead of a
start. Other languages have a process of theirs started in the same place, waiting in a preload script (node_wait.cjs).

*Spares.* The process for the next run is made ahead of need and waits at a pipe for its environment. It is made only
once everything of the run before is dead, so no program ever shares the sandbox with the spare of a later run and
can't read or change it. While it waits a Python spare writes to all its copy-on-write pages: taking those faults
during the run would cost more than all the rest of it.

*Environment.* `env` may hold secrets of one run. It goes from the control socket into a buffer, from there into the
spare's pipe, and the buffer is zeroed; the supervisor's heap, which later spares inherit, never has a copy.

*Ending.* The run is over when its first process ends. Then `kill(-1, SIGKILL)` from PID 1 reaches every process left in
the PID namespace at once, so a fork bomb can't outrun it; ESRCH says that none is left. Only then the state file is
read: nobody can rewrite it any more.

*Network.* A run with internet is supervised: its process is under a filter by which the kernel notifies the host of
each connect (connect_filter.py). The filter is put on the spare, as the last run had it, so it costs a warm run
nothing; a run that differs from the last one in that gets a new process. So does one whose certificates differ, where a
waiting interpreter has read those when it started.

*Scratch.* A tmpfs bounds bytes, not names, and empty files cost memory as well. So a run that lasts is looked at now
and then: with more entries in a scratch directory than there may be, it ends, as one that has filled the disk.

*Walls.* All of this happens under the driver's filter of system calls and, where the kernel has it, under Landlock
(landlock.py): we put ourselves into it before anything else, and each program once more.

*Failing.* Any surprise here ends PID 1, and with it the sandbox. The host notices, says so to the caller, and makes a
new sandbox from the last committed snapshot.

Wire format. The host and the supervisor talk over one stream socket. A frame is a kind (1 byte), the length of its
payload (4 bytes, big endian) and the payload.

  host to guest:  R  JSON, the header of a run. Behind this frame, unframed, its files, the state, the code and the
                     environment (JSON), each as long as the header says
                  K  kill the run under way
                  T  end the run under way: SIGTERM, and SIGKILL after GRACE
  guest to host:  N  with descriptors: the guest listeners, then the host's end of the socket broker
                  G  the same, where the kernel has seccomp user notification. N or G comes first, once
                  Y  JSON, the isolation as seen from inside: ready for the first run
                  B  the program is about to begin: from here on the run may have had effects
                  O, E  a piece of stdout, of stderr
                  S  the state file's content, if it isn't what was written before the run
                  D  JSON, how the run ended. It comes last
"""

from __future__ import annotations

import ctypes
import gc
import io
import json
import os
import resource
import select
import signal
import sys
import time

import connect_filter
import landlock
import socket_broker
import workspace
from isolation import isolation_seen
from processes import (
    kill_everything,
    populate_pages,
    read_environment,
    reset_signals,
    restore_signals,
    signal_everything,
    wide_pipe,
)
from system_v import SystemV, device_files
from workspace import STATE_FILE, empty_directory, read_state, write_file

TYPE_CHECKING = False  # as type checkers know it; importing it from typing would cost every sandbox
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from last_value import LastValue

GRACE = 2.0  # seconds between SIGTERM and SIGKILL at the deadline
CHUNK = 1 << 16
COURTESY = 0.004  # seconds for which the spare of the next run waits after this one, unless that comes
BURST = 0.01  # a run that comes within so many seconds of the last one's end has its spare made at once
TICK = 0.1  # seconds between looks at the scratch directories: most runs are over before the first
LOOK, LOOK_SOON = 0.02, 0.001  # seconds between looks whether a program has ended, where there are no pidfds
PR_SET_DUMPABLE = 4

# Modules that the supervisor has loaded for itself. A program must find them unloaded.
OURS = (
    *(
        "supervisor",
        "workspace",
        "landlock",
        "system_v",
        "connect_filter",
        "socket_broker",
        "isolation",
        "processes",
        "last_value",
    ),
    *("_socket", "ctypes", "ctypes._endian", "_ctypes", "fcntl", "resource"),
)
# What programs import most. Each costs memory in every spare, and time when it is finalized.
PRELOAD = ("collections", "datetime", "json", "math", "os.path", "random", "re", "string", "traceback")

_libc = ctypes.CDLL(None, use_errno=True)
_gc_untrack = ctypes.pythonapi.PyObject_GC_UnTrack
_gc_track = ctypes.pythonapi.PyObject_GC_Track
for _function in (_gc_untrack, _gc_track):
    _function.argtypes, _function.restype = (ctypes.py_object,), None


class BecomeProgram(BaseException):
    """Raised in a forked child to unwind to `serve()`, which then returns to the interpreter."""


class Control:
    """Frames to and from the host, over the control socket. Its end is the sandbox's end."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def read_into(self, buffer: bytearray) -> None:
        view = memoryview(buffer)
        while view:
            count = os.readv(self.fd, [view])
            if not count:
                os._exit(0)  # the host is gone
            view = view[count:]

    def read(self, size: int) -> bytes:
        buffer = bytearray(size)
        self.read_into(buffer)
        return bytes(buffer)

    def receive(self) -> tuple[bytes, bytes]:
        """The next frame's kind and payload."""
        head = self.read(5)
        return head[:1], self.read(int.from_bytes(head[1:], "big"))

    def send(self, kind: bytes, payload: bytes) -> None:
        message = memoryview(kind + len(payload).to_bytes(4, "big") + payload)
        while message:
            message = message[os.write(self.fd, message) :]


class Spare:
    """A process that waits for its environment and then is the program `entry`."""

    def __init__(self, pid: int, go: int, stdout: int, stderr: int, entry: str) -> None:
        """`go` is the pipe for the environment, `stdout` and `stderr` those of the program; all three our ends."""
        self.pid = pid
        try:
            self.pidfd = os.pidfd_open(pid)
        except OSError:
            self.pidfd = -1  # gVisor has none: follow() looks for the end instead
        self.go = go
        self.stdout = stdout
        self.stderr = stderr
        self.entry = entry

    def start(self, environment: bytearray) -> None:
        """Hand over `environment` (JSON) and zero it. Raises BrokenPipeError if the spare is dead, and so has run
        nothing."""
        try:
            size = len(environment).to_bytes(4, "big")
            os.write(self.go, size)
            view = memoryview(environment)
            while view:
                view = view[os.write(self.go, view) :]
        finally:
            os.close(self.go)
            self.go = -1
        environment[:] = bytes(len(environment))

    def has_ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def close(self) -> None:
        for fd in (self.pidfd, self.go, self.stdout, self.stderr):
            if fd >= 0:
                os.close(fd)


class Supervisor:
    """Runs one program after the other, as the host says."""

    def __init__(self, config: dict[str, Any], loaded_at_start: set[str]) -> None:
        """`config` is drivers/guest.py's `supervisor_config`, completed by `prepare`; `loaded_at_start` the names of
        the top-level modules that a plain Python has loaded."""
        self.control = Control(config["control"])
        self.broker: socket_broker.SocketBroker | None = config["broker"]
        self.language = config["language"]
        self.entry: str = config["entry"]
        self.fork: bool = config["fork"]
        """Whether programs are this interpreter, forked."""
        self.warm = config["warm"]
        """argv of a waiting process, without the entry; None: there is none."""
        self.cold = config["cold"]
        """argv of a process that starts from nothing, without the entry."""
        self.options = config["offline"], config["online"]
        """More of argv: for runs without internet, and with it."""
        self.environment: dict[str, str] = config["environment"]
        """The language's variables, which waiting processes need before they get those of their run."""
        self.cache = config["cache"]
        self.rlimits = [(getattr(resource, name), value) for name, value in config["rlimits"].items()]
        self.workspace = os.getcwd()
        self.scratch = config["scratch"]
        self.scratch_entries: int = config["scratch_entries"]
        self.guest_directory, self.clients = config["guest"], config["clients"]
        self.site: str = config["site"]
        """The site directory that the session's programs install into."""
        self.layer: str = config["layer"]
        """What the session's programs have installed; `site` is below it."""
        self.layer_directories: list[str] = config["layer_directories"]
        self.isolation = config["isolation"]
        self.last_value: LastValue | None = config["last_value"]
        self.loaded_at_start = loaded_at_start
        self.spare: Spare | None = None
        self.certificates: dict[str, str] = config["certificates"]
        """Variables that waiting processes are started with, since Node reads them only then: those of the last run."""
        self.supervised: bool = config["supervised"]
        """Whether waiting processes are under the connect filter, as that of the last run was."""
        self.devices = device_files()
        self.system_v = SystemV()

    # -- the loop -----------------------------------------------------------------------------------------------

    def loop(self) -> NoReturn:
        self.spare = self.make_spare(self.entry)
        self.control.send(b"Y", json.dumps(self.isolation).encode())
        ended = 0.0
        while True:
            kind, payload = self.control.receive()
            if kind == b"R":
                in_a_burst = time.monotonic() - ended < BURST
                header = json.loads(payload)
                self.run(header)
                ended = time.monotonic()
                if not in_a_burst:
                    # The host is committing this run, and has better use for the processor at this moment.
                    select.select([self.control.fd], [], [], COURTESY)
                self.clean(header["ephemeral"])
                self.spare = self.make_spare(self.entry)

    def run(self, header: dict[str, Any]) -> None:
        """One run, from its R frame to its D frame."""
        control = self.control
        os.chmod(self.workspace, 0o755)  # by its path: "." can't be found once a program has closed it to itself
        for path, size in header["files"]:
            directory = os.path.dirname(path)
            if directory:
                os.makedirs(directory, exist_ok=True)
            write_file(path, control.read(size))
        state = control.read(header["state"])
        code = control.read(header["code"])
        environment = bytearray(header["environment"])
        control.read_into(environment)

        write_file(STATE_FILE, state)
        command = header["command"]
        entry = self.free_entry()
        written = None if command else write_file(entry, code)
        if not os.path.isdir(self.site):  # it has been emptied, or a program has removed it
            self.make_layer()
        control.send(b"B", b"")  # from here on the run may have had effects, and must not be tried again
        begun = time.monotonic()
        refiltered, self.supervised = header["supervised"] != self.supervised, header["supervised"]
        cold = header["cold"] or (not self.fork and (refiltered or header["certificates"] != self.certificates))
        self.certificates = header["certificates"]
        spare = self.start_program(entry, environment, cold, command, reuse=not refiltered)
        ended = self.follow(spare, begun + header["timeout"], header["output"])
        ended["duration"] = time.monotonic() - begun
        spare.close()
        removed = written is not None and workspace.remove_if_unchanged(entry, written)
        ended["entry"] = entry if removed else None
        content, ended["state_problem"] = read_state(header["state_limit"])
        ended["state"] = "missing" if content is None else "same" if content == state else "sent"
        if content is not None and content != state:
            control.send(b"S", content)
        control.send(b"D", json.dumps(ended).encode())

    def clean(self, ephemeral: bool) -> None:
        """Remove what a run has left, except files in the working directory of a session that keeps them."""
        for directory in self.scratch:
            empty_directory(directory, 0o1777)
        if self.cache and (ephemeral or workspace.nearly_full(self.cache)):
            empty_directory(self.cache, 0o755)
        if ephemeral:
            empty_directory(self.workspace, 0o755)
            empty_directory(self.layer, 0o755)
        if device_files() != self.devices:  # possible in gVisor only, where /dev can't be read-only
            raise RuntimeError("a run has changed /dev")
        self.system_v.remove()

    def make_layer(self) -> None:
        """Make the directories that programs install into."""
        os.chmod(self.layer, 0o755)
        for name in self.layer_directories:
            try:
                os.makedirs(f"{self.layer}/{name}", exist_ok=True)
            except OSError:
                pass  # a program has made something else of it, and finds that

    # -- starting -----------------------------------------------------------------------------------------------

    def free_entry(self) -> str:
        """The name of the program's file: the language's usual one, or another if the session has such a file."""
        name, serial = self.entry, 0
        while os.path.lexists(name):
            serial += 1
            name = f"__main__{'' if serial == 1 else serial}{os.path.splitext(self.entry)[1]}"
        return name

    def start_program(
        self, entry: str, environment: bytearray, cold: bool, command: list[str] | None, *, reuse: bool
    ) -> Spare:
        """Start the program: the spare, or a new process where that can't be it. `reuse`: it may be the spare. `cold`:
        a new process must start the interpreter from nothing. Zeroes `environment`."""
        spare, self.spare = self.spare, None
        if spare is None:
            raise RuntimeError("a run was asked for before its spare was made")
        if not cold and not command and reuse and entry == spare.entry:
            try:
                spare.start(environment)
                return spare
            except BrokenPipeError:
                pass  # it died while it waited, so it has run nothing
        os.kill(spare.pid, signal.SIGKILL)
        os.waitpid(spare.pid, 0)
        spare.close()
        spare = self.make_spare(entry, cold=cold or not self.fork or entry != spare.entry, command=command)
        spare.start(environment)
        return spare

    def make_spare(self, entry: str, *, cold: bool = False, command: list[str] | None = None) -> Spare:
        """Fork a process for a program. It waits for the environment, and then

        - becomes the program, where that is this interpreter;
        - or is another language's interpreter, started at once and waiting in its preload script;
        - or starts the interpreter, where there is no such script or the start is to be `cold`;
        - or starts `command`."""
        go, go_end = os.pipe()
        stdout, stdout_end = wide_pipe()
        stderr, stderr_end = wide_pipe()
        pid = os.fork()
        if pid:
            for fd in (go, stdout_end, stderr_end):
                os.close(fd)
            return Spare(pid, go_end, stdout, stderr, entry)
        try:
            os.setsid()
            # Pipes come above 3 here, since 3 is the control socket, so no dup2 below closes one still needed.
            os.dup2(stdout_end, 1)
            os.dup2(stderr_end, 2)
            os.dup2(go, 3)
            if self.supervised and self.broker is not None:
                self.broker.send(b"L", [connect_filter.install()])
            os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
            _libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
            landlock.enter_own_domain()
            with open("/proc/self/oom_score_adj", "wb") as file:
                file.write(b"1000")  # out of memory: the program goes, not its supervisor
            for which, value in self.rlimits:
                resource.setrlimit(which, (value, value))
            options = self.options[self.supervised]
            if self.warm and not cold and not command:
                restore_signals()
                own = {"ERA_SPARE": "1", "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
                os.execve(self.warm[0], [*self.warm, *options, entry], {**self.certificates, **self.environment, **own})
            becomes = self.fork and not cold and not command
            if becomes:
                populate_pages()
            environment = read_environment()
            os.close(3)
            if not becomes:
                restore_signals()
                program = command or [*self.cold, *options, entry]
                os.execvpe(program[0], program, environment)
            self.forget_ourselves(environment)
            if self.last_value is not None:
                self.last_value.watch(f"{self.workspace}/{entry}")
        except BaseException as problem:
            os.write(2, f"era: the program could not be started: {problem}\n".encode())
            os._exit(126)
        raise BecomeProgram

    def forget_ourselves(self, environment: dict[str, str]) -> None:
        """Leave the interpreter as `python3 main.py` would find it, but for modules that are loaded already."""
        os.environ.clear()
        os.environ.update(environment)
        sys.path[sys.path.index(self.guest_directory)] = self.clients  # as PYTHONPATH says
        sys.path_importer_cache.pop(self.guest_directory, None)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)  # what was printed before a kill is not lost
        for name in OURS:
            sys.modules.pop(name, None)
        # A file of the session's own hides a module of the same name, as it would had we not loaded that one.
        preloaded = {name.partition(".")[0] for name in sys.modules} - self.loaded_at_start
        with os.scandir(".") as entries:
            own = {entry.name.partition(".")[0] for entry in entries if workspace.is_importable(entry)}
        for name in own & preloaded:
            for loaded in [module for module in sys.modules if module.partition(".")[0] == name]:
                del sys.modules[loaded]
        # What was loaded ahead stays frozen: collecting it at exit would take longer than most programs. But not the
        # program's own globals, or what they hold would never be finalized: files not flushed, objects not deleted.
        own_globals = vars(sys.modules["__main__"])
        _gc_untrack(own_globals)
        _gc_track(own_globals)
        gc.enable()
        if workspace.has_path_files(self.site):
            sys.modules["site"].addsitedir(self.site)  # as it is done when an interpreter starts

    # -- following ----------------------------------------------------------------------------------------------

    def follow(self, spare: Spare, deadline: float, output_limit: int) -> dict[str, Any]:
        """Pass on output until the program ends, is killed, is out of time or fills a scratch directory; then kill what
        it left."""
        control = self.control
        kinds = {spare.stdout: b"O", spare.stderr: b"E"}
        room = {b"O": output_limit, b"E": output_limit}
        truncated = {b"O": False, b"E": False}
        cause = "exit"
        poller = select.poll()
        broker_fd = -1 if self.broker is None else self.broker.fd
        for fd in (control.fd, broker_fd, spare.pidfd, *kinds):
            if fd >= 0:
                poller.register(fd, select.POLLIN)

        def pass_on(fd: int) -> None:
            data = os.read(fd, CHUNK)
            if not data:
                poller.unregister(fd)
                del kinds[fd]
                return
            kind = kinds[fd]
            if len(data) > room[kind]:
                truncated[kind] = True
                data = data[: room[kind]]
            if data:
                room[kind] -= len(data)
                control.send(kind, data)

        running = True
        next_look = time.monotonic() + TICK
        disk_problem: str | None = None
        while running:
            now = time.monotonic()
            if now >= next_look:
                next_look = now + TICK
                disk_problem = self.overfull_scratch()
                if disk_problem is not None and cause == "exit":
                    cause = "disk_full"
                    break
            left = deadline - now
            if left <= 0:
                if cause != "exit":
                    break
                cause = "timeout"
                deadline += GRACE
                signal_everything(signal.SIGTERM)
                continue
            left = min(left, next_look - now)
            if spare.pidfd < 0:  # a program mostly ends when its output does
                left = min(left, LOOK if kinds else LOOK_SOON)
            for fd, _ in poller.poll(left * 1000):
                if fd in kinds:
                    pass_on(fd)
                elif fd == spare.pidfd:
                    running = False
                elif self.broker is not None and fd == broker_fd:
                    if not self.broker.answer():
                        poller.unregister(fd)
                else:
                    kind = control.receive()[0]
                    if kind == b"K":
                        cause = "killed"
                        running = False
                    elif kind == b"T" and cause == "exit":
                        cause = "killed"
                        deadline = time.monotonic() + GRACE
                        signal_everything(signal.SIGTERM)
            if spare.pidfd < 0 and spare.has_ended():
                running = False
        status, usage, reaped = kill_everything(spare.pid)
        while kinds:  # every writer is dead: this ends
            for fd in list(kinds):
                pass_on(fd)
        code = os.waitstatus_to_exitcode(status)
        if cause == "timeout":
            code = 124
        elif code < 0:
            cause = "signal" if cause == "exit" else cause
            code = 128 - code
        elif cause == "disk_full":
            cause = "exit"  # it came first
        return {
            "exit_code": code,
            "cause": cause,
            "disk_problem": disk_problem if cause == "disk_full" else None,
            "stdout_truncated": truncated[b"O"],
            "stderr_truncated": truncated[b"E"],
            "reaped": reaped,
            "peak_memory_bytes": usage.ru_maxrss * 1024,
            "cpu_us": int((usage.ru_utime + usage.ru_stime) * 1e6),
        }

    def overfull_scratch(self) -> str | None:
        """A sentence if a scratch directory has more entries than it may, else None."""
        for directory in (*self.scratch, self.cache) if self.cache else self.scratch:
            room = os.statvfs(directory)
            if room.f_files - room.f_ffree > self.scratch_entries:
                return f"{directory} holds more than {self.scratch_entries} files"
        return None


# -- starting up ------------------------------------------------------------------------------------------------


def serve(loaded_at_start: frozenset[str]) -> None:
    """Supervise this sandbox. Returns only in a forked child, to become the program. `loaded_at_start` are the modules
    that a plain Python has loaded."""
    try:
        supervisor = prepare(loaded_at_start)
        supervisor.loop()
    except BecomeProgram:
        return
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)


def prepare(loaded_at_start: frozenset[str]) -> Supervisor:
    """Read the configuration (ERA_GUEST, JSON; drivers/guest.py writes it), hand over sockets, put up the walls."""
    config = json.loads(os.environ.pop("ERA_GUEST"))
    control = config["control"]
    if control != 3:
        os.dup2(control, 3, inheritable=False)
        config["control"] = 3
    os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    # An empty stdin of the sandbox's own: the host's /dev/null could not be opened again, by its name /dev/stdin.
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.umask(0o022)
    reset_signals()
    config["broker"] = None  # in gVisor, gvisor.py has it and the connect filter
    if config["guest_listeners"]:
        can_supervise = connect_filter.is_available()
        config["broker"] = socket_broker.hand_over(3, config["guest_listeners"], can_supervise=can_supervise)
        config["supervised"] = config["supervised"] and can_supervise
    isolation = isolation_seen()  # before our own /proc is closed to us too
    config["isolation"] = {**isolation, "landlock": landlock.restrict(config["landlock"])}
    _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # /proc/1/{mem,environ,fd} are out of every program's reach
    config["last_value"] = None
    if config["fork"]:
        for name in PRELOAD:
            __import__(name)
        import last_value

        config["last_value"] = last_value.prepared()
        gc.collect()
        gc.freeze()
    gc.disable()
    return Supervisor(config, {name.partition(".")[0] for name in loaded_at_start})
