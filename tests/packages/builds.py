"""Builds for tests: in real sandboxes, or, for attacks to succeed, without any wall."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from era import languages
from era.core.concurrency.shares import Shares
from era.core.concurrency.turns import Liveness
from era.core.limits import Rules
from era.core.models import DEFAULT_OWNER, EMPTY, Session
from era.core.pool.pool import SandboxPool
from era.core.program import Limits
from era.core.setup.commands import Build, Builds
from era.core.setup.progress import LastWords, Say
from era.core.trees.memory import Memories
from era.core.trees.snapshots import Snapshots
from era.languages.node import NODE
from era.network.egress import SandboxNetwork
from era.network.indexes import IndexListeners
from era.network.policy import Policy
from tests.drivers.sandboxes import LIMITS, Sandboxes, Weakness
from tests.packages.registry import tarball


def session(key: int, **fields: Any) -> Session:
    """A session of this key that asks for packages."""
    usual: dict[str, Any] = {
        "language": "python",
        "persistent": True,
        "data": "{}",
        "metadata": {},
        "allow_internet": True,
    }
    usual |= {"allow_public": True, "default_timeout": 30.0, "stored": None, "version": 1, "snapshot": EMPTY}
    usual |= {"owner": DEFAULT_OWNER, "created_at": 1, "updated_at": 1, "last_run_at": None}
    return Session(key=key, id=f"s{key}", **{**usual, **fields})


@contextmanager
def real_builds(
    directory: Path, driver: str = "bubblewrap", limits: Limits = LIMITS
) -> Iterator[tuple[Sandboxes, Builds]]:
    """A driver with its sandboxes, and builds in them."""
    sandboxes = Sandboxes(directory, Weakness(limits=limits), driver, self_tested=())
    rules = Rules(limits, limits)

    class Drivers:
        async def get(self, _: str) -> Any:
            return sandboxes.driver

    class Forgetful:
        memories = Memories(lambda _: None)

        def forget(self, _: str) -> None:
            pass

    pool = SandboxPool(
        Drivers(),
        cast(Snapshots, Forgetful()),
        cast(Any, None),
        liveness=Liveness(),
        rules=rules,
        spares=0,
        max_warm=4,
        idle_seconds=60,
        kept_bytes=0,
    )
    network = SandboxNetwork(Shares(1000), Policy())
    try:
        yield sandboxes, partial(Build, pool, network, IndexListeners(), rules)
    finally:
        sandboxes._runner.run(pool.stop())
        sandboxes.stop()
        network.stop()


class UnsandboxedBuild:
    """A Build whose code runs on the host, as the tests' own user: what sandboxes exist to prevent."""

    def __init__(self, owner: str) -> None:
        self.owner, self.session_owner = owner, "own"

    @asynccontextmanager
    async def sandbox(self, language: str) -> AsyncIterator[UnsandboxedBuild]:
        with tempfile.TemporaryDirectory() as directory:
            self.directory, self.uid = Path(directory), None
            yield self

    async def run(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        deadline: float,
        indexes: Sequence[str] = (),
        say: Say | None = None,
    ) -> tuple[str | None, LastWords]:
        node = str(languages.runtime("node").mounts[NODE])
        words = [word.replace(NODE, node) for word in command]
        for number, index in enumerate(indexes):
            words = [word.replace(f"{{{number}}}", index) for word in words]
        process = await asyncio.create_subprocess_exec(
            *words, cwd=self.directory, env={**os.environ, **env}, start_new_session=True,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await process.communicate()
        return ("failed" if process.returncode else None), LastWords(stderr=output.decode())


def unsandboxed(owner: str) -> Build:
    return cast(Build, UnsandboxedBuild(owner))


BACKEND = """
import os, zipfile
def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    files = {}
    exec(open("attack.py").read(), {"files": files})
    name = "NAME-1.0-py3-none-any.whl"
    files["NAME-1.0.dist-info/METADATA"] = "Metadata-Version: 2.1\\nName: NAME\\nVersion: 1.0\\n"
    files["NAME-1.0.dist-info/WHEEL"] = "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
    files["NAME-1.0.dist-info/RECORD"] = "".join(f"{path},,\\n" for path in files)
    with zipfile.ZipFile(os.path.join(wheel_directory, name), "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return name
"""


def sdist(name: str, attack: str, requires: Sequence[str] = ()) -> bytes:
    """A source distribution, version 1.0, whose build runs the code `attack`. That adds the files of the wheel to
    `files`, by path."""
    needs = ", ".join(f'"{one}"' for one in requires)
    project = f'[build-system]\nrequires = [{needs}]\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    files = {
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        "pyproject.toml": project,
        "backend.py": BACKEND.replace("NAME", name),
        "attack.py": attack,
    }
    return tarball(files, f"{name}-1.0")


def with_disk(megabytes: int) -> Limits:
    return replace(LIMITS, disk_bytes=megabytes << 20)
