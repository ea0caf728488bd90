"""The part of an installation that runs packages' own code, in a sandbox: builds by uv, install scripts of npm.

The host copies in what is needed and moves the result out. In between it touches nothing, and it doesn't look at the
result before nothing runs in the sandbox any more (trees.move_out).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from era.core.models import JsonObject
from era.core.setup.commands import Build
from era.core.setup.package_sets import SetupFailed
from era.core.setup.progress import Say
from era.core.setup.requirements import Packages
from era.languages.node import NODE
from era.packages import tools, trees
from era.packages.processes import Ran

_IN_PLACE = ["/bin/sh", "-c", 'mkdir -p tmp && TMPDIR="$PWD/tmp" exec "$@"', "sh"]
"""Starts a tool with a TMPDIR in the working directory: compilers need more room than /tmp has."""

_VARIABLES = {"UV_NO_CONFIG": "1"}


@dataclass(slots=True)
class Making:
    """An installation under way."""

    scratch: Path
    deadline: float
    """Of the monotonic clock."""

    say: Say | None
    variables: Mapping[str, str]
    """Environment variables of the tools."""

    waits_as: str | None = None
    """The owner in whose turn its tools wait for a slot; None where it has one for as long as it lasts."""

    stdout: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)
    npm: list[JsonObject] = field(default_factory=list)
    """The lock's entries for node_modules."""

    built_for: str | None = None
    """The session that it belongs to (Build.owner), if some of it was built."""


class MustBuild(SetupFailed):
    """A package of this kind, `pip` or `npm`, has to run code in order to be installed."""

    def __init__(self, kind: str, message: str, stdout: str = "", stderr: str = "") -> None:
        super().__init__(message, stdout, stderr)
        self.kind = kind


async def build_python(
    build: Build,
    packages: Packages,
    python: str,
    indexes: Sequence[str],
    making: Making,
) -> None:
    """Have uv install Python packages in a sandbox, building them where that is needed, and move them to
    `scratch/site`. `python` is the interpreter of sandboxes. `indexes` are addresses; the first has the lowest
    priority. Raises SetupFailed, EraError where no sandbox can be had."""
    async with build.sandbox("python") as sandbox:
        uv, requirements = sandbox.directory / "uv", sandbox.directory / "requirements.txt"
        shutil.copyfile(tools.uv_binary(), uv)
        uv.chmod(0o755)
        requirements.write_text("".join(f"{line}\n" for line in packages.pip))
        requirements.chmod(0o644)
        command = tools.pip_command(python, "site", "requirements.txt", "cache", "./uv", wheels_only=False)
        for number in range(len(indexes)):
            command += ["--default-index" if number == 0 else "--index", f"{{{number}}}"]
        problem, output = await sandbox.run(
            [*_IN_PLACE, *command], _VARIABLES, deadline=making.deadline, indexes=indexes, say=making.say
        )
        if problem is not None:
            raise _failed("pip", problem, output.stdout, output.stderr)
        trees.move_out(sandbox.directory, "site", making.scratch / "site")


async def run_scripts(build: Build, scripts: Mapping[str, bool], making: Making) -> None:
    """Run install scripts of packages in the project `scratch/npm`, in a sandbox. `scripts` has the packages' paths,
    and whether each is optional: one that is may fail, of which the output tells. Raises SetupFailed, EraError where no
    sandbox can be had."""
    npm = making.scratch / "npm"
    is_needed = {path.rpartition("node_modules/")[2]: False for path in scripts}
    for path, optional in scripts.items():
        is_needed[path.rpartition("node_modules/")[2]] |= not optional
    needed = [name for name in is_needed if is_needed[name]]
    others = [name for name in is_needed if not is_needed[name]]
    async with build.sandbox("node") as sandbox:
        project = sandbox.directory / "npm"
        (npm / "package-lock.json").unlink(missing_ok=True)  # it may know more of registries than is needed
        npm.rename(project)
        trees.own(project, sandbox.uid)
        for group in [needed, *([name] for name in others)]:
            if not group:
                continue
            command = [*_IN_PLACE, *tools.rebuild_command(NODE, "npm", group)]
            problem, output = await sandbox.run(command, _VARIABLES, deadline=making.deadline, say=making.say)
            if problem is not None and group is needed:
                raise _failed("npm", problem, output.stdout, output.stderr)
            if problem is not None:
                making.stdout.append(f"The install script of {group[0]}, which is optional, {problem}")
        npm.mkdir(mode=0o700)
        trees.move_out(sandbox.directory, "npm/node_modules", npm / "node_modules")


def _failed(tool: str, problem: str, stdout: str, stderr: str) -> SetupFailed:
    """The error for a build: how it ended (`problem`), what its output means, and the last lines of that."""
    ran = Ran(1, stdout.strip(), stderr.strip())
    return SetupFailed(f"The build {problem}. {tools.problem(tool, ran)}", stdout, stderr, no_such=tools.no_such(ran))
