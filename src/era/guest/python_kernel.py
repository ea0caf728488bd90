"""The interpreter of a Python context: a process that stays, and executes one cell after the other in IPython's shell.

Theory of operation
===================

It is started as `python3 python_kernel.py PACKAGES` by the process supervisor, with the channel to the service at
descriptor 3, which it moves to where programs don't stumble upon it. Everything in this process is within reach of the
cells. So nothing that it says is believed about anything but its own cell, and the service copes with whatever comes
out of it (core/live/contexts.py).

*IPython.* PACKAGES has IPython and what it needs, as the service brought them. They are looked for last, so a session's
own version of any of them is what programs import, and then what this shell is made of as well. Where those don't go
together with the rest, the shell is made of ours alone, and programs still import theirs.

*Output.* Descriptors 1 and 2 are the supervisor's pipes, for the program and for all that it starts. The service gets
output and channel on separate ways. So behind a cell's output comes a mark, on each pipe, and what comes before the
marks is the cell's. A pipe that is empty needs none: the supervisor has read it already, and passes on what it reads in
that order. Before a P or C frame comes another mark, on each pipe, by which the service puts results and output in
order (core/live/kernel_frames.py).

*Interrupts.* SIGINT raises KeyboardInterrupt while a cell is executed, at its first line where it came before that, and
does nothing between cells. A cell may handle it otherwise, for itself only.

*Forks.* A process that a cell has forked and that comes to the end of the cell ends there.

Wire format, both ways: a kind (1 byte), the length of the payload (4 bytes, big endian), the payload.

  service to kernel:  X  JSON, a cell: `code`, `env`, `cwd`, `stdin`, `event_mark` and `mark` (text: before each P or C,
                         and at the end), `limit` (bytes of results)
                      I  interrupt the cell under way, if there is one. For kernels that hear it
  kernel to service:  Y  JSON, what the interpreter is, and whether it `hears` while a cell is under way; it is ready
                      B  the cell begins: from here on it can be interrupted
                      P  JSON, a result: `data`, `metadata`, `main`, `marked` (descriptors), perhaps `display_id`,
                         `update`, `execution_count`
                      C  JSON, take back all results so far: `wait` (only once there is a new one), `marked`
                      D  JSON, the end of the cell: `error`, `exit_code`, `execution_count`, `marked` (descriptors),
                         `interrupted`, `results_truncated`, `ends`, `memory_bytes`
"""

from __future__ import annotations

import builtins
import fcntl
import importlib.machinery
import io
import os
import select
import signal
import socket
import struct
import sys
import termios
import threading
import time
from json import dumps, loads

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, ModuleType
    from typing import Any, NoReturn

    from ipython_shell import Shell

OUT_OF_THE_WAY = 900  # below the least RLIMIT_NOFILE there is, above what programs number through
POLL = 0.1
RESTART = "POST /api/sessions/{id}/contexts/{name}/restart gives it a new interpreter, without its variables."
MARK_MS = 10_000  # for somebody to read what is in the way of a mark
PAGE = os.sysconf("SC_PAGESIZE")


class Channel:
    """The socket to the service, and the pipes of the output, by their descriptors: `outputs` maps them to duplicates
    that cells don't change."""

    def __init__(self, fd: int) -> None:
        self.outputs = {fd: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, OUT_OF_THE_WAY) for fd in (1, 2)}
        self._event_mark: bytes | None = None
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, OUT_OF_THE_WAY)
        os.close(fd)
        self._socket = socket.socket(fileno=moved)
        self._turn = threading.RLock()
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        """Take a turn of its own for the child, as a thread that isn't there may have the other. What the child shows
        has no marks: it may outlive the cell, and the marks would be output of the next one."""
        self._turn = threading.RLock()
        if self._event_mark is not None:
            self._event_mark = b""

    def begin(self, event_mark: bytes) -> None:
        """Show what the cell that begins shows, behind this mark in the pipes."""
        with self._turn:
            self._event_mark = event_mark

    def end(self) -> None:
        """Show nothing until the next cell begins."""
        with self._turn:
            self._event_mark = None

    def send(self, kind: bytes, payload: bytes) -> None:
        """Send a frame as a whole: other threads wait, and so does an interrupt, which is the main thread's."""
        self._uninterrupted(lambda: self._send(kind, payload))

    def show(self, kind: bytes, content: bytes) -> None:
        """Send a P or C frame behind all that has been written to stdout and stderr so far. `content` is a JSON object
        that isn't empty, to which `marked` is added. Between cells nothing is sent."""
        flush()
        self._uninterrupted(lambda: self._show(kind, content))

    def _show(self, kind: bytes, content: bytes) -> None:
        if self._event_mark is not None:
            marked = dumps(self._mark() if self._event_mark else []).encode()
            self._send(kind, content[:-1] + b', "marked": ' + marked + b"}")

    def _send(self, kind: bytes, payload: bytes) -> None:
        self._socket.sendall(kind + struct.pack(">I", len(payload)) + payload)

    def _mark(self) -> list[int]:
        """Write a mark into each pipe. Returns the descriptors of those that took it."""
        marked = []
        for fd, output in self.outputs.items():
            try:
                write_mark(output, self._event_mark or b"")
                marked.append(fd)
            except OSError:
                pass
        return marked

    def _uninterrupted(self, call: Callable[[], None]) -> None:
        if threading.current_thread() is not threading.main_thread():
            with self._turn:
                call()
            return
        interrupts: list[int] = []
        handler = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
        try:
            with self._turn:
                call()
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler if handler is None else handler)  # None: it is C's
        if interrupts:
            signal.raise_signal(signal.SIGINT)

    def receive(self) -> tuple[bytes, bytes]:
        kind, size = struct.unpack(">cI", self._read(5))
        return kind, self._read(size)

    def _read(self, size: int) -> bytes:
        content = bytearray()
        while len(content) < size:
            piece = self._socket.recv(min(size - len(content), 1 << 20))
            if not piece:
                os._exit(0)  # the service has gone
            content += piece
        return bytes(content)


class Kernel:
    """Executes cells."""

    def __init__(self, channel: Channel, shell: Shell) -> None:
        self._channel = channel
        self._shell = shell
        self._pid = os.getpid()
        self._home = os.getcwd()
        self._was_interrupted = False
        self._shell_failed = False
        """IPython has raised an error that isn't the cell's."""

    def loop(self) -> NoReturn:
        while True:
            kind, payload = self._channel.receive()
            if kind == b"X":
                self._execute(loads(payload))

    def _execute(self, cell: dict[str, Any]) -> None:
        """One cell, from its X frame to its D frame."""
        shell, results = self._shell, self._shell.results
        results.begin(cell["limit"], shell.execution_count)
        self._channel.begin(cell["event_mark"].encode())
        shell.last_error, shell.wants_to_end = None, False
        before = {name: os.environ.get(name) for name in cell["env"]}
        directory = os.open(".", os.O_PATH | os.O_CLOEXEC) if cell["cwd"] else -1
        stdin = give_stdin(cell["stdin"])
        exit_code, self._was_interrupted, self._shell_failed = 1, False, False
        try:
            os.environ.update(cell["env"])
            if cell["cwd"]:
                os.chdir(os.path.join(self._home, cell["cwd"]))
            try:
                signal.signal(signal.SIGINT, shell.note_interrupt)
                self._channel.send(b"B", b"")
                exit_code = self._run(cell["code"])
            finally:
                signal.signal(signal.SIGINT, ignore)
        except BaseException as problem:  # an interrupt in the last moment, a directory that isn't there
            self._was_interrupted = isinstance(problem, KeyboardInterrupt)
            error = shell.note_error(type(problem), problem)
            os.write(self._channel.outputs[2], f"{error['traceback']}\n".encode(errors="replace"))
        finally:
            signal.signal(signal.SIGINT, ignore)
            shell.let_go()
            if os.getpid() != self._pid:
                flush()
                os._exit(0)
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            take_stdin(stdin)
            if directory >= 0:
                os.fchdir(directory)
                os.close(directory)
        self._end(exit_code, cell["mark"].encode())

    def _run(self, code: str) -> int:
        """Run the cell's code. Returns its exit code."""
        shell = self._shell
        try:
            result = shell.run_cell(code, store_history=True)
        except Exception:
            self._shell_failed = True
            raise
        problem = result.error_before_exec or result.error_in_exec
        shell.history_manager.outputs.clear()  # or everything ever printed would stay in memory
        if problem is None:
            return 0
        self._was_interrupted = isinstance(problem, KeyboardInterrupt)
        if isinstance(problem, SystemExit):
            return code_of(problem)
        if shell.last_error is None:
            shell.note_printed_error(problem)
        return 1

    def _end(self, exit_code: int, mark: bytes) -> None:
        """Tell the service that the cell has ended."""
        self._channel.end()
        flush()
        self._say_damage()
        marked = []
        for fd, output in self._channel.outputs.items():
            try:
                if not is_empty(output):
                    write_mark(output, mark)
                    marked.append(fd)
            except OSError:
                pass
        shell = self._shell
        ended = {
            "error": shell.last_error if exit_code else None,
            "exit_code": exit_code,
            "execution_count": shell.execution_count - 1,
            "marked": marked,
            "interrupted": self._was_interrupted,
            "results_truncated": shell.results.truncated,
            "ends": shell.wants_to_end,
            "memory_bytes": memory_bytes(),
        }
        self._channel.send(b"D", dumps(ended).encode())
        if shell.wants_to_end:
            sys.exit(0)  # with its exit handlers, as any interpreter

    def _say_damage(self) -> None:
        """Write to stderr what the program has damaged of its interpreter, and how to get another one."""
        damage = damage_of_output() or ("IPython fails outside the cell's own code" if self._shell_failed else "")
        if damage and not self._shell.wants_to_end:
            try:
                write_mark(self._channel.outputs[2], f"era: this context is damaged: {damage}. {RESTART}\n".encode())
            except OSError:
                pass


def damage_of_output() -> str:
    """Say why the program can't write output any more; empty where it can."""
    for name, fd in (("stdout", 1), ("stderr", 2)):
        try:
            stream = getattr(sys, name)
            can_write = not getattr(stream, "closed", False) and callable(stream.write) and callable(stream.flush)
        except Exception:
            can_write = False
        if not can_write:
            return f"sys.{name} can't be written to"
        try:
            os.fstat(fd)
        except OSError:
            return f"descriptor {fd} ({name}) is closed"
    return ""


def ignore(number: int, frame: FrameType | None) -> None:
    """A signal that does nothing. Unlike SIG_IGN it isn't inherited by what cells start."""


def is_empty(pipe: int) -> bool:
    """Whether everything that was written to a pipe has been read."""
    count = bytearray(4)
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return not any(count)


def write_mark(pipe: int, mark: bytes) -> None:
    """Write a mark, for which there may be no room yet in a pipe that a cell has made not to block. Raises OSError."""
    poller = select.poll()
    poller.register(pipe, select.POLLOUT)
    while True:
        try:
            os.write(pipe, mark)  # all of it or nothing, as it is short
            return
        except BlockingIOError:
            if not poller.poll(MARK_MS):
                raise


def give_stdin(text: str) -> int:
    """Give the cell, and what it starts, this standard input. Returns what `take_stdin` takes."""
    if not text:
        return -1
    file = os.memfd_create("stdin", os.MFD_CLOEXEC)
    with open(file, "wb", closefd=False) as content:
        content.write(text.encode())
    os.lseek(file, 0, os.SEEK_SET)
    empty = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, OUT_OF_THE_WAY)
    os.dup2(file, 0)
    os.close(file)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    return empty


def take_stdin(empty: int) -> None:
    """Have standard input empty again."""
    if empty >= 0:
        os.dup2(empty, 0)
        os.close(empty)
        sys.stdin = sys.__stdin__


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            pass


def code_of(ended: SystemExit) -> int:
    """The exit code of a process that would have ended so."""
    if ended.code is None:
        return 0
    return ended.code & 0xFF if isinstance(ended.code, int) else 1


def memory_bytes() -> int | None:
    """What this process has in memory."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * PAGE
    except (OSError, ValueError, IndexError):
        return None


# -- the packages -----------------------------------------------------------------------------------------------------


def load_shell(packages: str, channel: Channel) -> Shell:
    """Make the shell, of the session's own versions of what it needs, and of those in `packages` otherwise."""
    before = set(sys.modules)
    sys.path.append(packages)
    try:
        return proven(make_shell(channel))
    except Exception:
        for name in set(sys.modules) - before:
            del sys.modules[name]
    sys.path.remove(packages)
    sys.path.insert(0, packages)
    shell = proven(make_shell(channel))
    sys.path.remove(packages)
    keep_private(packages, sys.path)
    sys.path.append(packages)
    return shell


def make_shell(channel: Channel) -> Shell:
    import ipython_shell

    return ipython_shell.make_shell(ipython_shell.Results(channel.show))


def proven(shell: Shell) -> Shell:
    """The shell, if it can execute a cell. Raises what is in its way."""
    shell.run_cell("1;", silent=True).raise_error()
    return shell


def keep_private(packages: str, path: list[str]) -> None:
    """Have programs import from `path` what is there, though the shell has others of that name, from `packages`."""
    names = {entry.name.partition(".")[0] for entry in os.scandir(packages)} - {"__pycache__"}
    own = {name for name in names if importlib.machinery.PathFinder.find_spec(name, path) is not None}
    if own:
        PrivateImports(packages, own).install()


class PrivateImports:
    """Imports of some names by modules in `packages` find those in there, and all others' imports find others."""

    def __init__(self, packages: str, names: set[str]) -> None:
        self._packages = packages
        self._names = names
        self._import = builtins.__import__
        self._private = self._take()
        """Modules by their full names."""

    def install(self) -> None:
        builtins.__import__ = self  # type: ignore[assignment]  # the kind of import that modules do

    def __call__(
        self,
        name: str,
        globals: dict[str, Any] | None = None,
        locals: dict[str, Any] | None = None,
        fromlist: tuple[str, ...] = (),
        level: int = 0,
    ) -> object:
        importer = globals or {}
        top = (importer.get("__package__") or "" if level else name).partition(".")[0]
        if top not in self._names or not str(importer.get("__file__", "")).startswith(f"{self._packages}/"):
            return self._import(name, globals, locals, fromlist, level)
        others = self._take()
        sys.modules.update(self._private)
        sys.path.insert(0, self._packages)
        try:
            return self._import(name, globals, locals, fromlist, level)
        finally:
            sys.path.remove(self._packages)
            self._private = self._take()
            sys.modules.update(others)

    def _take(self) -> dict[str, ModuleType]:
        """Take the modules of these names from where imports look first."""
        taken = [module for module in sys.modules if module.partition(".")[0] in self._names]
        return {module: sys.modules.pop(module) for module in taken}


def main(packages: str) -> NoReturn:
    guest_directory = sys.path.pop(0)
    channel = Channel(3)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while not os.path.isdir(packages):  # they are being prepared, once for this machine
        time.sleep(POLL)
    sys.path.append(guest_directory)
    shell = load_shell(packages, channel)
    sys.path.remove(guest_directory)
    del sys.modules["ipython_shell"]
    keep_private(packages, [os.getcwd()])  # as in any program, a module of the session's own hides a package
    sys.path.insert(0, "")
    sys.argv[:] = [""]
    kernel = Kernel(channel, shell)
    signal.signal(signal.SIGINT, ignore)
    version = sys.modules[type(shell).__mro__[1].__module__.partition(".")[0]].__dict__.get("__version__", "?")
    ready = {"kernel": f"IPython {version}", "memory_bytes": memory_bytes()}
    channel.send(b"Y", dumps(ready).encode())
    kernel.loop()


if __name__ == "__main__":
    main(sys.argv[1])
