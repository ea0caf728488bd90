"""The engines of a cluster for trying: which are wanted, whether that can be had, and in which order they start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from era.cluster.engines import postgresql, ray_nodes, s3
from era.cluster.local import Engine
from era.errors import NotReady

_APT = "apt-get install "


def check(directory: Path, wanted: Set[str], variables: Mapping[str, str]) -> None:
    """Raise NotReady where a cluster in this directory can't have the wanted engines, or had others."""
    missing = {
        "postgresql": "" if postgresql.commands() else postgresql.MISSING,
        "s3": "" if s3.is_there() else s3.MISSING,
        "ray": "" if ray_nodes.is_there() else ray_nodes.MISSING,
    }
    if lacking := [(name, *why.split(": ", 1)) for name, why in missing.items() if name in wanted and why]:
        said = ", ".join(f"--{name}: {what}" for name, what, _ in lacking)
        raise NotReady(f"{said}. To get it: {_in_one([command for _, _, command in lacking])}")
    for name, variable in (("postgresql", "ERA_DATABASE_URL"), ("s3", "ERA_BLOBS")):
        if name in wanted and variables.get(variable):
            raise NotReady(f"--{name} starts one of its own, and {variable} names another: leave one of them out.")
        has_it = (directory / name / "keys.json").exists()
        if has_it and name not in wanted:
            raise NotReady(f"The cluster in {directory} was started with --{name}: say that again.")
        if name in wanted and not has_it and (directory / "shared").exists():
            raise NotReady(f"The cluster in {directory} was started without --{name}: name another --dir.")
    if "ray" in wanted and "postgresql" not in wanted and not variables.get("ERA_DATABASE_URL"):
        raise NotReady("--ray needs --postgresql, or ERA_DATABASE_URL.")


def _in_one(commands: Sequence[str]) -> str:
    """Join commands that install packages into one line, those of apt-get into one command."""
    packages = [command.removeprefix(_APT) for command in commands if command.startswith(_APT)]
    others = [command for command in commands if not command.startswith(_APT)]
    return " && ".join([*([_APT + " ".join(packages)] if packages else []), *others])


def engines(
    directory: Path, wanted: Set[str], hosts: Sequence[Mapping[str, str]], environment: Mapping[str, str]
) -> list[Engine]:
    """The wanted engines in the order in which they start. `hosts` are the settings that each host has of its own,
    `environment` is that of all of them, to which the settings of engines are added as these start."""
    found: list[Engine] = []
    if "postgresql" in wanted:
        found.append(postgresql.PostgreSQL(directory / "postgresql", len(hosts)))
    if "s3" in wanted:
        found.append(s3.S3(directory / "s3"))
    if "ray" in wanted:
        nodes = ray_nodes.RayNodes(directory / "ray", hosts)
        found += [nodes, ray_nodes.Driver(directory / "ray", nodes, environment)]
    return found
