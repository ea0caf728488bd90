"""A process that has imported the server, and forks the `era` command at each call: to import it takes longer than most
tests do.

What is forked goes on as `era` does, from the first line of its `main` to just before the interpreter's own end, but a
server tests sandboxes of one language at its start instead of all. Starts from nothing, and such ends, are tested in
tests/client/test_start.py, sandboxes of every language in tests/drivers/test_languages.py.
"""

from __future__ import annotations

import array
import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

_MESSAGE = 1 << 20
"""The longest message in bytes; the environment is most of it."""

_NETWORK = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
"""The network namespace that the tests began in. The thread may be in another one when the first command is needed."""


class Preloaded:
    """The forking process, as the tests know it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._here, there):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MESSAGE)
        with there:
            # -P: our neighbours aren't its modules
            command = [sys.executable, "-P", __file__, str(there.fileno()), str(_NETWORK)]
            self._process = subprocess.Popen(command, pass_fds=[there.fileno(), _NETWORK])
        atexit.register(self._end)

    def start(
        self,
        words: list[str],
        environment: dict[str, str],
        streams: tuple[int, int, int],
        cwd: Path | None = None,
        before: str = "",
    ) -> Forked:
        """Start `era` with these arguments, and with descriptors for its input, output and errors. `before` are Python
        statements that the process executes first."""
        question = {"words": words, "environment": environment, "cwd": str(cwd or Path.cwd()), "before": before}
        return Forked(self, self.ask(question, *streams))

    def ask(self, question: dict[str, Any], *fds: int) -> Any:
        """Ask the process for something; returns its answer."""
        with self._lock:
            passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            self._here.sendmsg([json.dumps(question).encode()], passed)
            return json.loads(self._here.recv(_MESSAGE))

    def _end(self) -> None:
        self._here.close()
        self._process.wait()


class Forked:
    """A forked command, as `subprocess.Popen` would have it: the part that tests use."""

    def __init__(self, parent: Preloaded, pid: int) -> None:
        self._parent = parent
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._parent.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.poll() is None:
            process = os.pidfd_open(self.pid)
            try:
                select.select([process], [], [], timeout)
            finally:
                os.close(process)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("era", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _carry_out() -> NoReturn:
    """Do what the command does, but for the end of the interpreter: it takes apart all that was imported, and copies
    the pages which hold that, which takes longer than most tests. Threads, exit handlers and streams end as ever."""
    gc.freeze()  # nor does it look for garbage among that
    code: object = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter calls
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else code is not None)


def _self_test_one_language() -> None:
    """Have drivers test sandboxes of Python only when they start, and not of each language: that would take longer than
    all else of a server's start."""
    from era.drivers.bubblewrap import BubblewrapDriver

    make = BubblewrapDriver.__init__

    def init(driver: BubblewrapDriver, *given: Any, **more: Any) -> None:
        make(driver, *given, **more)
        driver.self_tested = ["python"]

    BubblewrapDriver.__init__ = init  # type: ignore[method-assign, assignment]  # for all that are made


def _answer(here: socket.socket) -> None:
    """Do what is asked for until nobody can ask any more, then tell those to end which a test left that failed or was
    interrupted. Returns in forks only, which are to begin then."""
    forks: set[int] = set()
    while True:
        message, ancillary, _, _ = here.recvmsg(_MESSAGE, socket.CMSG_SPACE(12))
        if not message:
            for pid in forks:
                os.kill(pid, signal.SIGTERM)
                os.kill(pid, signal.SIGCONT)
            sys.exit()
        question = json.loads(message)
        if "poll" in question:
            ended, status = os.waitpid(question["poll"], os.WNOHANG)
            forks.discard(ended)
            here.send(json.dumps(os.waitstatus_to_exitcode(status) if ended else None).encode())
            continue
        streams = array.array("i", ancillary[0][2])
        pid = os.fork()
        for number, stream in enumerate(streams):
            if pid == 0:
                os.dup2(stream, number)
            os.close(stream)
        if pid:
            forks.add(pid)
            here.send(json.dumps(pid).encode())
            continue
        here.close()
        os.chdir(question["cwd"])
        os.environ.clear()
        os.environ.update(question["environment"])
        sys.argv = [str(Path(sys.executable).with_name("era")), *question["words"]]
        exec(question["before"], {})
        return


if __name__ == "__main__":
    began = int(sys.argv[2])
    if os.fstat(began).st_ino != os.fstat(_NETWORK).st_ino:
        os.setns(began, os.CLONE_NEWNET)
    os.close(began)
    os.close(_NETWORK)
    from importlib import import_module

    from era.client.cli import main

    for name in ("era.app", "era.client.serve", "era.client.operation", "alembic.context", "uvicorn.lifespan.off"):
        import_module(name)
    for name in ("backup", "check", "rows"):
        import_module(f"era.operation.{name}")
    _self_test_one_language()
    gc.collect()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which end this by hanging up
    _answer(socket.socket(fileno=int(sys.argv[1])))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _carry_out()
