"""The supervisor: PID 1 of every sandbox. It starts programs, passes on what they print, and ends them.

Theory of operation
===================

*Becoming the program.* The sandbox's first process is `python3 main.py`, with `main.py` not there yet and this
directory on the path. Python imports `sitecustomize` before it looks at `main.py`, and that import runs `serve()`,
which never returns in PID 1. For a run it forks; the child *returns* from `serve()`, and the interpreter goes on with
what it was asked for: it opens `main.py`, makes `__main__`, runs it, finalizes. So the program is a real `python3
main.py` from argv to exit handlers, with none of our frames beneath it, and yet costs a fork instead of a start. Where
nobody can notice the last part of finalizing, it is left out (early_exit.py). Other languages have a process of theirs
started in the same place, waiting in a preload script (node_wait.cjs). PID 1 may be a fork itself, of a template
(template.py).

*Spares.* The process for the next run is made ahead of need and waits at a pipe for its environment. It is made only
once everything of the run before is dead, so no program ever shares its PID namespace with the spare of a later run and
can't read or change it. (In a burst, a sandbox of Node's has two supervisors that take turns; drivers/alternation.py.)
A Python spare is already as far as it can be before it waits (spare_wait.py): what it writes to then
need not be copied during the run.

*Files.* The program and the state of a run are new files, which are made before the run, and those that they take the
place of are let go of after it (fresh_files.py).

*Environment.* `env` may hold secrets of one run. It goes from the control socket into a buffer, from there into the
spare's pipe, and the buffer is zeroed; the supervisor's heap, which later spares inherit, never has a copy.

*Ending.* The run is over when its first process ends. Then `kill(-1, SIGKILL)` from PID 1 reaches every process left in
the PID namespace at once, so a fork bomb can't outrun it; ESRCH says that none is left. Only then the state file is
read: nobody can rewrite it any more.

*Network.* A run with internet is supervised: its process is under a filter by which the kernel notifies the host of
each connect (connect_filter.py). The filter is put on the spare, as the last run had it, so it costs a warm run
nothing; a run that differs from the last one in that gets a new process. So does one whose certificates differ, where a
waiting interpreter has read those when it started.

*Output.* The first bytes are passed on at once. After a small piece the next is read GATHER later: a program that
prints line by line would otherwise wake us, the host and whoever follows the run with each line, which in gVisor costs
thirty times what the printing does. While it waits a pipe still reports that its last writer has gone.

*Scratch.* A tmpfs bounds bytes, not names, and empty files cost memory as well. So a run that lasts is looked at now
and then: with more entries in a scratch directory than there may be, it ends, as one that has filled the disk. Beside
processes (process_supervisor.py) nothing is removed there after a run, and what it found doesn't count against it.

*Walls.* All of this happens under the driver's filter of system calls and, where the kernel has it, under Landlock
(landlock.py): we put ourselves into it before anything else, and each program once more.

*Failing.* Any surprise here ends PID 1, and with it the sandbox. The host notices, says so to the caller, and makes a
new sandbox from the last committed snapshot.

Wire format. The host and the supervisor talk over one stream socket. A frame is a kind (1 byte), the length of its
payload (4 bytes, big endian) and the payload.

  host to guest:  R  JSON, the header of a run. Behind this frame, unframed, its files, the state, the code, the
                     environment (JSON) and standard input, each as long as the header says. The last two come only
                     once the program may begin: what needs neither is done before
                  K  kill the run under way
                  T  end the run under way: SIGTERM, and SIGKILL after GRACE
                  J  processes are about to be started beside the run under way
  guest to host:  N  with descriptors: the guest listeners, then the host's end of the socket broker
                  G  the same, where the kernel has seccomp user notification. N or G comes first, once
                  Y  JSON, the isolation as seen from inside: ready for the first run
                  B  the program is about to begin: from here on the run may have had effects
                  O, E  a piece of stdout, of stderr
                  S  the state file's content, if it isn't what was written before the run
                  D  JSON, how the run ended. It comes last
                  F  what the run has left is removed. Only where the header asks for it: another supervisor of runs
                     has the next one (drivers/alternation.py)
"""

from __future__ import annotations

import ctypes
import gc
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
import spare_wait
import startup
import workspace
from fresh_files import FreshFiles
from output_follower import Control, Spare, follow, zero
from processes import Invocation, Scheduling, execute, read_environment, restore_signals, wide_pipe
from workspace import STATE_FILE, Layer, SystemV, device_files, empty_directory, read_state

TYPE_CHECKING = False  # as type checkers know it; importing it from typing would cost every sandbox
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from program_module import ProgramModule

AS_USUAL = Invocation()
COURTESY = 0.004  # seconds for which the spare of the next run waits after this one, unless that comes
BURST = 0.01  # a run that comes within so many seconds of the last one's end has its spare made at once
PR_SET_DUMPABLE = 4
_FILES_OF_A_RUN = 2  # its program and its state

# Modules that the supervisor has loaded for itself. A program must find them unloaded.
OURS = (
    *(
        "supervisor",
        "workspace",
        "landlock",
        "immortal_objects",
        "connect_filter",
        "output_follower",
        "fresh_files",
        "socket_broker",
        "processes",
        "namespace_entry",
        "container_split",
        "early_exit",
        "program_module",
        "spare_wait",
        "startup",
        "template",
    ),
    *("_socket", "ctypes", "ctypes._endian", "_ctypes", "fcntl", "resource"),
)

_kept: list[object] = []
"""What a program's process is to keep, though nothing needs it."""

_prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up once, and not in each process
_gc_untrack = ctypes.pythonapi.PyObject_GC_UnTrack
_gc_track = ctypes.pythonapi.PyObject_GC_Track
for _function in (_gc_untrack, _gc_track):
    _function.argtypes, _function.restype = (ctypes.py_object,), None


class BecomeProgram(BaseException):
    """Raised in a forked child to unwind to `serve()`, which then returns to the interpreter."""


class Supervisor:
    """Runs one program after the other, as the host says."""

    def __init__(self, config: dict[str, Any], loaded_at_start: set[str]) -> None:
        """`config` is drivers/guest.py's `supervisor_config`, completed by startup.py; `loaded_at_start` are the names
        of the top-level modules that a plain Python has loaded."""
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
        self.start = __import__(config["starter"]).start if config["starter"] else execute
        """Called with that argv, completed, and the environment, to become the program."""
        self.options = config["offline"], config["online"]
        """More of argv: for runs without internet, and with it."""
        self.environment: dict[str, str] = config["environment"]
        """The language's variables, which waiting processes need before they get those of their run."""
        self.cache = config["cache"]
        self.rlimits = [(getattr(resource, name), value) for name, value in config["rlimits"].items()]
        self.workspace = os.getcwd()
        self.scratch = config["scratch"]
        self.scratch_entries: int = config["scratch_entries"]
        self.layer = Layer(config["layer"], config["layer_directories"], config["site"])
        self.isolation = config["isolation"]
        self.program_module: ProgramModule | None = config["program_module"]
        self.loaded_at_start = loaded_at_start
        self.spare: Spare | None = None
        self.certificates: dict[str, str] = config["certificates"]
        """Variables that waiting processes are started with, since Node reads them only then: those of the last run."""
        self.supervised: bool = config["supervised"]
        """Whether waiting processes are under the connect filter, as that of the last run was."""
        self.own_domain = landlock.OwnDomain()
        self.devices = device_files()
        self.scheduling = Scheduling()
        self.system_v = SystemV()
        self.fresh_files = FreshFiles(_FILES_OF_A_RUN)

    # -- the loop -----------------------------------------------------------------------------------------------

    def loop(self) -> NoReturn:
        self.spare = self.make_spare(self.entry)
        self.fresh_files.prepare()
        self.control.send(b"Y", json.dumps(self.isolation).encode())
        ended = 0.0
        while True:
            kind, payload = self.control.receive()
            if kind == b"R":
                in_a_burst = time.monotonic() - ended < BURST
                header = json.loads(payload)
                self.run(header)
                ended = time.monotonic()
                tells_when_clean = header["tells_when_clean"]
                if not in_a_burst and not tells_when_clean:
                    # The host is committing this run, and has better use for the processor at this moment.
                    select.select([self.control.fd], [], [], COURTESY)
                self.control.note_joined()
                self.clean(header["ephemeral"], header["keeps_scratch"] or self.control.joined)
                if tells_when_clean:
                    self.control.send(b"F", b"")
                self.fresh_files.prepare()
                self.spare = self.make_spare(self.entry)

    def run(self, header: dict[str, Any]) -> None:
        """One run, from its R frame to its D frame."""
        control = self.control
        control.joined = False
        os.chmod(self.workspace, 0o755)  # by its path: "." can't be found once a program has closed it to itself
        obstacle = written = None
        for path, size in header["files"]:
            _, problem = workspace.try_to_write(path, control.read(size))
            obstacle = problem or obstacle
        state = control.read(header["state"])
        code = control.read(header["code"])
        _, state_problem = workspace.try_to_write(STATE_FILE, state, self.fresh_files.write)
        entry = self.free_entry()
        if not header["command"]:
            written, problem = workspace.try_to_write(entry, code, self.fresh_files.write)
            obstacle = problem or obstacle
        self.layer.prepare()
        environment = bytearray(header["environment"])
        control.read_into(environment)
        invocation = Invocation(header, control.read(header["stdin"]))
        control.send(b"B", b"")  # from here on the run may have had effects, and must not be tried again
        begun = time.monotonic()
        refiltered, self.supervised = header["supervised"] != self.supervised, header["supervised"]
        cold = header["cold"] or (not self.fork and (refiltered or header["certificates"] != self.certificates))
        self.certificates = header["certificates"]
        spare = self.start_program(entry, environment, cold, invocation, obstacle, reuse=not refiltered)
        invocation.close()
        before = self.scratch_used() if header["keeps_scratch"] else {}
        ended = follow(
            self.control,
            self.broker,
            spare,
            begun + header["timeout"],
            header["output"],
            lambda: workspace.overfull(self.scratch_used(), self.scratch_entries, before),
        )
        ended["duration"] = time.monotonic() - begun
        spare.close()
        removed = written is not None and workspace.remove_if_unchanged(entry, written)
        ended["entry"] = entry if removed else None
        content, ended["state_problem"] = read_state(header["state_limit"])
        if state_problem is not None:
            content, ended["state_problem"] = None, f"can't be written before the run: {state_problem.strerror}"
        ended["state"] = "missing" if content is None else "same" if content == state else "sent"
        if content is not None and content != state:
            control.send(b"S", content)
        control.send(b"D", json.dumps(ended).encode())

    def clean(self, ephemeral: bool, keeps_scratch: bool) -> None:
        """Remove what a run has left, except files in the working directory of a session that keeps them. With
        `keeps_scratch` there are processes beside runs, which may be using the rest."""
        if not keeps_scratch:
            for directory in self.scratch:
                empty_directory(directory, 0o1777)
            self.system_v.remove()
            if self.cache and (ephemeral or workspace.nearly_full(self.cache)):
                empty_directory(self.cache, 0o755)
        if ephemeral:
            empty_directory(self.workspace, 0o755)
            self.layer.empty()
        if device_files() != self.devices:  # possible in gVisor only, where /dev can't be read-only
            raise RuntimeError("a run has changed /dev")

    # -- starting -----------------------------------------------------------------------------------------------

    def free_entry(self) -> str:
        """The name of the program's file: the language's usual one, or another if the session has such a file."""
        name, serial = self.entry, 0
        while os.path.lexists(name):
            serial += 1
            name = f"__main__{'' if serial == 1 else serial}{os.path.splitext(self.entry)[1]}"
        return name

    def start_program(
        self,
        entry: str,
        environment: bytearray,
        cold: bool,
        invocation: Invocation,
        obstacle: OSError | None,
        *,
        reuse: bool,
    ) -> Spare:
        """Start the program: the spare, or a new process where that can't be it. `reuse`: it may be the spare. `cold`:
        a new process must start the interpreter from nothing. `obstacle`: why a file of the program couldn't be
        written; then the process only reports this. Zeroes `environment`."""
        spare, self.spare = self.spare, None
        if spare is None:
            raise RuntimeError("a run was asked for before its spare was made")
        if not cold and invocation.is_usual and reuse and entry == spare.entry and obstacle is None:
            try:
                spare.start(environment)
                return spare
            except BrokenPipeError:
                pass  # it died while it waited, so it has run nothing
        os.kill(spare.pid, signal.SIGKILL)
        os.waitpid(spare.pid, 0)
        spare.close()
        spare = self.make_spare(entry, invocation, obstacle, cold=cold or not self.fork or entry != spare.entry)
        try:
            spare.start(environment)
        except BrokenPipeError:
            zero(environment)  # it has given up, as without its directory, and said why
        return spare

    def make_spare(
        self, entry: str, invocation: Invocation = AS_USUAL, obstacle: OSError | None = None, *, cold: bool = False
    ) -> Spare:
        """Fork a process for a program. With an `obstacle` it reports that and ends. Else it waits for
        the environment, and then

        - becomes the program, where that is this interpreter;
        - or is another language's interpreter, started at once and waiting in its preload script;
        - or starts the interpreter, where there is no such script or the start is to be `cold`;
        - or starts the command of `invocation`."""
        self.scheduling.restore()
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
            if invocation.stdin >= 0:
                os.dup2(invocation.stdin, 0)
            if self.supervised and self.broker is not None:
                self.broker.send(b"L", [connect_filter.install()])
            self.own_domain.enter()
            os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
            _prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
            with open("/proc/self/oom_score_adj", "wb") as file:
                file.write(b"1000")  # out of memory: the program goes, not its supervisor
            for which, value in self.rlimits:
                resource.setrlimit(which, (value, value))
            if obstacle is not None:
                raise obstacle
            options = self.options[self.supervised]
            if self.warm and not cold and not invocation.command:
                restore_signals()
                own = {"ERA_SPARE": "1", "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
                os.execve(self.warm[0], [*self.warm, *options, entry], {**self.certificates, **self.environment, **own})
            if invocation.directory:
                os.chdir(f"{self.workspace}/{invocation.directory}")
            # The interpreter that is forked opens its program by a name relative to the working directory.
            becomes = self.fork and not cold and not invocation.command and not invocation.directory
            if not becomes:
                environment = read_environment()
                os.close(3)
                restore_signals()
                program = f"{self.workspace}/{entry}" if invocation.directory else entry
                start = execute if invocation.command else self.start
                start(invocation.command or [*self.cold, *options, program, *invocation.args], environment)
            self.become(f"{self.workspace}/{entry}")
            sys.argv.extend(invocation.args)
            sys.orig_argv.extend(invocation.args)
        except BaseException as problem:
            give_up(problem)
        raise BecomeProgram

    def become(self, path: str) -> None:
        """Let the interpreter go on as that of a program, which is at `path`. It will wait for the environment before
        it opens that."""
        # What was loaded ahead is frozen: collecting it at exit would take longer than most programs. But not the
        # program's own globals, or what they hold would never be finalized: files not flushed, objects not deleted.
        gc.freeze()
        own_globals = vars(sys.modules["__main__"])
        _gc_untrack(own_globals)
        _gc_track(own_globals)
        if self.program_module is not None:
            self.program_module.watch(path)
        # Kept, and not let go of: that would write to many pages which this process still shares with the supervisor.
        _kept.extend((self, spare_wait.Waiting(path, self.begin)))
        gc.enable()

    def begin(self) -> None:
        """Wait for the environment; the program begins when this returns."""
        try:
            environment = read_environment()
            os.close(3)
            os.environ.update(environment)
            self.layer.look_anew()
            # A file of the session's own hides a module of the same name, as it would had we not loaded that one.
            preloaded = {name.partition(".")[0] for name in sys.modules} - self.loaded_at_start
            with os.scandir(".") as entries:
                own = {entry.name.partition(".")[0] for entry in entries if workspace.is_importable(entry)}
            for name in own & preloaded:
                for loaded in [module for module in sys.modules if module.partition(".")[0] == name]:
                    del sys.modules[loaded]
            self.layer.act_upon_path_files()
        except BaseException as problem:
            give_up(problem)

    def scratch_used(self) -> dict[str, int]:
        """How many entries there are in each scratch directory."""
        used: dict[str, int] = workspace.entries((*self.scratch, self.cache) if self.cache else self.scratch)
        return used


def forget_ourselves(guest_directory: str, clients: str) -> None:
    """Leave the interpreter as `python3 main.py` would find it, but for modules that are loaded already. Once, and not
    in each program's process, where it would write to pages that are shared until then."""
    os.environ.clear()
    sys.path[sys.path.index(guest_directory)] = clients  # as PYTHONPATH says
    sys.path_importer_cache.pop(guest_directory, None)
    _kept.extend(sys.modules.pop(name, None) for name in OURS)


def give_up(problem: BaseException) -> NoReturn:
    """End a child that could not become the program."""
    os.write(2, f"era: the program could not be started: {problem}\n".encode())
    os._exit(126)


# -- starting up ------------------------------------------------------------------------------------------------


def serve(loaded_at_start: frozenset[str]) -> None:
    """Supervise this sandbox. Returns only in a forked child, to become the program. `loaded_at_start` are the modules
    that a plain Python has loaded."""
    try:
        config = startup.prepare()
        if config.get("is_second"):
            import process_supervisor

            process_supervisor.serve(config)
        if config["fork"]:
            forget_ourselves(config["guest"], config["clients"])
            gc.freeze()
        supervisor = Supervisor(config, {name.partition(".")[0] for name in loaded_at_start})
        supervisor.loop()
    except BecomeProgram:
        return
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)
