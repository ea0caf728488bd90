"""Sandboxes in a process of an ordinary user's, for tests that run as root. The two processes exchange pickles."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from era.core.models import JsonObject
from era.drivers.memory import MemoryWatch
from era.errors import EraError, SandboxFailed
from tests.conftest import assert_nothing_left, descendants, mounts

UID = 54_321
_PROJECT = Path(__file__).resolve().parent.parent.parent


@dataclass
class UserSandbox:
    """A sandbox of the other process, as far as it is known here."""

    id: str
    workspace: Path
    uid: int | None
    enforced: JsonObject


class UserSandboxes:
    """Sandboxes (see sandboxes.py) of the user UID, with their data below `directory`."""

    def __init__(self, directory: Path, driver: str) -> None:
        directory.mkdir(exist_ok=True)
        os.chown(directory, UID, UID)
        # A mount namespace shows that user what lies in directories that are closed to it.
        script = (
            "mount -t tmpfs none /mnt && mkdir /mnt/project /mnt/venv /mnt/data "
            f"&& mount --bind '{_PROJECT}' /mnt/project && mount --bind '{sys.prefix}' /mnt/venv "
            f"&& mount --bind '{directory}' /mnt/data && cd /mnt/project "
            f"&& exec setpriv --reuid {UID} --regid {UID} --clear-groups "
            f"/mnt/venv/bin/python -B -m tests.drivers.as_user {driver}"
        )
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": "/mnt/project/src:/mnt/project", "HOME": "/mnt"}
        self._directory = directory
        self._process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self.pid = self._process.pid
        self.uid, self.cgroup_name = self._ask("hello")

    def make(self, language: str = "python") -> UserSandbox:
        sandbox: UserSandbox = self._ask("make", language)
        sandbox.workspace = self._directory / sandbox.workspace.relative_to("/mnt/data")
        return sandbox

    def run(self, sandbox: UserSandbox, code: str, **more: Any) -> Any:
        return self._ask("run", sandbox.id, code, **more)

    def do(self, sandbox: UserSandbox, step: Any, *given: Any) -> Any:
        return self._ask("do", sandbox.id, step, *given)

    def alive(self, sandbox: UserSandbox) -> bool:
        return bool(self._ask("alive", sandbox.id))

    def close(self, sandbox: UserSandbox) -> None:
        self._ask("close", sandbox.id)

    def murder(self, sandbox: UserSandbox) -> None:
        self._ask("murder", sandbox.id)

    def traces(self) -> JsonObject:
        return dict(self._ask("traces"))

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Runs within aren't ended for the memory that they take."""
        self._ask("watch", False)
        yield
        self._ask("watch", True)

    def stop(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def _ask(self, method: str, *given: Any, **more: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        pickle.dump((method, given, more), self._process.stdin)
        self._process.stdin.flush()
        succeeded, answer = pickle.load(self._process.stdout)
        if not succeeded:
            raise SandboxFailed(answer)
        return answer


def traces(sandboxes: Any) -> JsonObject:
    """What the host has of the sandboxes of this process."""
    pid = os.getpid()
    return {
        "processes": len(descendants(pid)),
        "mounts": mounts(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "directories": sorted(os.listdir(sandboxes.driver.directory)),
    }


@contextmanager
def opened(name: str, directory: Path) -> Iterator[Any]:
    """Sandboxes of a driver, such as "bubblewrap" or "bubblewrap as a user". At the end nothing of them may be left."""
    from tests.drivers.sandboxes import Sandboxes, Weakness

    driver, _, user = name.partition(" as ")
    root = os.geteuid() == 0
    if driver == "gvisor" and shutil.which("runsc") is None:
        pytest.skip("runsc is not installed")
    if not user and driver in ("bubblewrap", "gvisor") and not root:
        pytest.skip("only root can run it as root")
    before, processes = mounts(), set(descendants(os.getpid()))
    far = bool(user) and root
    made: Any = UserSandboxes(directory, driver) if far else Sandboxes(directory, Weakness(), driver)
    made.name, made.far, made.shared = name, far, {}
    yield made
    # Where this process has other sandboxes, their driver may start a template at any time.
    running = descendants(made.pid) if far else [pid for pid in descendants(os.getpid()) if pid not in processes]
    made.stop()
    assert_nothing_left(before, running, directory, made.cgroup_name)


def serve(driver: str) -> None:
    """Answer the calls that come in on stdin, until it ends."""
    from tests.drivers.sandboxes import Sandboxes, Weakness

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sandboxes = Sandboxes(Path("/mnt/data"), Weakness(), driver)
    made: dict[str, Any] = {}
    unwatched = patch.object(MemoryWatch, "start", lambda _: None)

    def answer(method: str, given: list[Any], more: dict[str, Any]) -> Any:
        if method == "hello":
            return os.getuid(), sandboxes.cgroup_name
        if method == "make":
            sandbox = sandboxes.make(*given)
            made[sandbox.id] = sandbox
            return UserSandbox(sandbox.id, sandbox.workspace, sandbox.uid, sandbox.enforced)
        if method == "traces":
            return traces(sandboxes)
        if method == "watch":
            (unwatched.stop if given[0] else unwatched.start)()
            return None
        if method == "alive":
            return made[given[0]].alive
        return getattr(sandboxes, method)(made[given[0]], *given[1:], **more)

    try:
        while True:
            try:
                call = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            try:
                result = True, answer(*call)
            except EraError as error:
                result = False, error.message
            except (AssertionError, TimeoutError) as error:  # a step's
                result = False, f"{type(error).__name__}: {error}"
            pickle.dump(result, answers)
            answers.flush()
    finally:
        sandboxes.stop()


if __name__ == "__main__":
    sys.path.insert(0, str(_PROJECT))
    # One module under one name, or its classes would be two.
    from tests.drivers import as_user

    as_user.serve(sys.argv[1])
