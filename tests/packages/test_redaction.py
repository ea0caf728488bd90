"""What tools print of registries' addresses: nothing that only the operator may know."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import pytest

from era.core.setup.package_sets import SetupFailed
from era.core.setup.requirements import packages_of
from era.packages import processes
from era.packages.processes import Redaction
from tests.packages.lab import Lab
from tests.packages.registry import Registry, put_evil_npm, wheel

TOKEN = "TOKENTOKEN"
GONE = f"https://{TOKEN}@127.0.0.1:9"
"""The address of a registry that nobody reaches, with a token in place of a name."""

SETUPS: dict[str, dict[str, Any]] = {
    "pip": {"pip": ["nothing"]},
    "npm": {"npm": ["nothing"]},
    "go": {"go": ["example.com/nothing@v1.0.0"]},
}


class Unredacted(Redaction):
    """Shows everything."""

    def shown(self, piece: bytes) -> bytes:
        return piece


@pytest.mark.parametrize(
    ("tool", "weakness"),
    [("pip", None), ("npm", None), ("go", None), ("npm", Unredacted), ("go", Unredacted)],
)
def test_a_registrys_token_is_in_nothing_that_owners_see(lab: Lab, tool: str, weakness: type[Redaction] | None) -> None:
    """Not in the message, the output or the events of a setup. With the weakness, npm and go do print it."""
    variables = {**lab.installer._variables, "UV_DEFAULT_INDEX": f"{GONE}/simple", "GOPROXY": f"{GONE}/go"}
    variables["npm_config_registry"] = f"{GONE}/npm/"
    said: list[bytes] = []
    job = lab.installer.make(packages_of(SETUPS[tool]), lab.build, anew=False, say=lambda _, piece: said.append(piece))
    with (
        patch.object(lab.installer, "_variables", variables),
        patch.object(processes, "Redaction", weakness or Redaction),
        pytest.raises(SetupFailed) as caught,
    ):
        lab.run(job)
    problem = caught.value
    seen = [str(problem), problem.stdout + problem.stderr, b"".join(said).decode()]
    assert all("127.0.0.1:9" in each for each in seen), seen
    assert [TOKEN in each for each in seen] == [weakness is not None] * 3, seen


def test_a_registrys_token_is_in_no_package_set(lab: Lab, registry: Registry) -> None:
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))
    put_evil_npm(registry, {})
    variables = {
        name: value.replace(registry.url, registry.url.replace("://", f"://{TOKEN}@"))
        for name, value in lab.installer._variables.items()
    }
    assert variables["npm_config_registry"].startswith(f"http://{TOKEN}@")
    with patch.object(lab.installer, "_variables", variables):
        made = lab.make(pip=["one"], npm=["evil"])
    assert TOKEN not in made.stdout + made.stderr
    top = lab.directory / "environments" / made.digest
    assert [path for path in top.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("get https://tok@host/a, or https://tok:pass@host:80/b", "get https://…@host/a, or https://…@host:80/b"),
        ("https://na@me:pa@ss@host", "https://…"),
        ("https://na@me:pa@ss@host\n", "https://…@host\n"),
        ("https://host/@scope/x and a@b: c:/d ://", "https://host/@scope/x and a@b: c:/d ://…"),
        ("of pip: ünd:", "of pip: ünd:"),
        ("https://tok", "https://…"),  # it was cut off
        ("", ""),
    ],
)
def test_redaction_wherever_pieces_end(said: str, shown: str) -> None:
    content = said.encode()
    for size in range(1, len(content) + 2):
        redaction = Redaction()
        pieces = [redaction.shown(content[at : at + size]) for at in range(0, len(content), size)]
        assert b"".join([*pieces, redaction.rest()]).decode() == shown, size


def test_redaction_of_hostile_output_takes_linear_time_and_little_memory() -> None:
    began = time.process_time()
    for said in (b"://" + b"@" * 100, b"://" + b"a" * 100_000, b":" * 1000, b"/" * 1000, b"://@"):
        redaction = Redaction()
        whole = said * (1_000_000 // len(said))
        for at in range(0, len(whole), 1 << 16):
            redaction.shown(whole[at : at + (1 << 16)])
            assert len(redaction._held) <= 16 << 10
        assert b"tok" not in redaction.shown(b" https://tok@host") + redaction.rest()
    assert time.process_time() - began < 10  # in quadratic time it would be minutes
