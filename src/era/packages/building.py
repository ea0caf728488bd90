"""What of an installation runs code of packages: builds of uv, install scripts of npm. All of it in a sandbox.

The host puts in what is needed, and moves out what came of it; between the two it touches nothing, and it looks at
nothing before the sandbox is dead (trees.taken).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from era.core.setup.builds import Build
from era.core.setup.package_sets import SetupFailed
from era.core.setup.progress import Say
from era.core.setup.requirements import Packages
from era.languages.node import NODE
from era.packages import tools, trees
from era.packages.processes import Ran

_IN_PLACE = ["/bin/sh", "-c", 'mkdir -p tmp && TMPDIR="$PWD/tmp" exec "$@"', "sh"]
"""How a tool is started: compilers need more room than /tmp has."""

_ENVIRONMENT = {"UV_NO_CONFIG": "1"}


class MustBuild(SetupFailed):
    """A package of this kind, `pip` or `npm`, must run code in order to be installed."""

    def __init__(self, kind: str, message: str, stdout: str = "", stderr: str = "") -> None:
        super().__init__(message, stdout, stderr)
        self.kind = kind


async def build_python(
    build: Build,
    packages: Packages,
    site: Path,
    python: str,
    indexes: Sequence[str],
    deadline: float,
    say: Say | None,
) -> None:
    """Have uv install and build Python packages from these indexes (the last one counts least), and move them to
    `site`. `python` is the interpreter of sandboxes. Raises SetupFailed, EraError where there is no sandbox."""
    async with build.place("python") as place:
        uv, requirements = place.directory / "uv", place.directory / "requirements.txt"
        shutil.copyfile(tools.uv_binary(), uv)
        uv.chmod(0o755)
        requirements.write_text("".join(f"{line}\n" for line in packages.pip))
        requirements.chmod(0o644)
        command = tools.pip_command(python, "site", "requirements.txt", "cache", "./uv", wheels_only=False)
        for number in range(len(indexes)):
            command += ["--default-index" if number == 0 else "--index", f"{{{number}}}"]
        problem, said = await place.run(
            [*_IN_PLACE, *command], _ENVIRONMENT, deadline=deadline, indexes=indexes, say=say
        )
        if problem is not None:
            raise _failed("pip", problem, said.stdout, said.stderr)
        trees.taken(place.directory, "site", site)


async def run_scripts(
    build: Build, scripts: Mapping[str, bool], npm: Path, deadline: float, say: Say | None
) -> list[str]:
    """Run the install scripts of npm's packages in the project `npm`: `scripts` are their paths, and whether the others
    can do without. What there is to say of it. Raises SetupFailed, EraError where there is no sandbox."""
    told = []
    names = {path.rpartition("node_modules/")[2]: False for path in scripts}
    for path, optional in scripts.items():
        names[path.rpartition("node_modules/")[2]] |= not optional
    needed, others = ([name for name, is_needed in names.items() if is_needed is wanted] for wanted in (True, False))
    async with build.place("node") as place:
        project = place.directory / "npm"
        (npm / "package-lock.json").unlink(missing_ok=True)  # it may know more of registries than is needed
        npm.rename(project)
        trees.own(project, place.uid)
        for some in [needed, *([name] for name in others)]:
            if not some:
                continue
            command = [*_IN_PLACE, *tools.rebuild_command(NODE, "npm", some)]
            problem, said = await place.run(command, _ENVIRONMENT, deadline=deadline, say=say)
            if problem is not None and some is needed:
                raise _failed("npm", problem, said.stdout, said.stderr)
            if problem is not None:
                told.append(f"The install script of {some[0]}, which is optional, {problem}")
        npm.mkdir(mode=0o700)
        trees.taken(place.directory, "npm/node_modules", npm / "node_modules")
    return told


def _failed(tool: str, problem: str, stdout: str, stderr: str) -> SetupFailed:
    """An error for a build: how it ended, what that means, and the last lines of what it said."""
    meaning = tools.problem(tool, Ran(1, stdout.strip(), stderr.strip()))
    return SetupFailed(f"The build {problem}. {meaning}", stdout, stderr)
