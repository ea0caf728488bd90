"""Several servers by name: what `era login` remembers, for whom, and to whom a key is sent."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.client.command import environment, era
from tests.conftest import ERA, MakeServer, Server


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CONFIG_HOME": str(tmp_path / "config")}


def test_a_server_is_remembered_with_its_key(own_server: MakeServer, home: dict[str, str]) -> None:
    server = own_server(api_key="right")
    assert "unauthorized" in era(None, "login", server.url, "--key", "wrong", "--json", env=home, code=2).stderr
    done = era(None, "login", server.url, "--key", "-", "--name", "work", stdin="right\n", env=home, code=0)
    assert "work" in done.stderr
    file = Path(home["XDG_CONFIG_HOME"]) / "era" / "servers.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text())["servers"] == {"work": {"url": server.url, "key": "right"}}
    assert [path.name for path in file.parent.iterdir()] == ["servers.json"]
    era(None, "sessions", "create", "python", "s", env=home, code=0)  # without saying which
    assert era(None, "sessions", "list", "--server", "work", env=home, code=0).stdout.startswith("s  python")
    assert era(None, "sessions", "list", "--server", server.url, env=home, code=0).stdout
    shown = era(None, "login", env=home, code=0).stdout
    assert "work" in shown
    assert "right" not in shown
    era(None, "logout", "work", env=home, code=0)
    assert era(None, "login", env=home, code=0).stdout == ""


def test_a_remembered_key_goes_to_its_server_only(own_server: MakeServer, server: Server, home: dict[str, str]) -> None:
    keyed = own_server(api_key="right")
    era(None, "login", keyed.url, "--key", "right", "--name", "work", env=home, code=0)
    era(None, "login", server.url, "--name", "mine", env=home, code=0)
    known = json.loads((Path(home["XDG_CONFIG_HOME"]) / "era" / "servers.json").read_text())
    assert known["servers"]["mine"]["key"] is None
    other = own_server(api_key="right")  # the same key would open it
    assert "unauthorized" in era(None, "sessions", "list", "--json", "--server", other.url, env=home, code=2).stderr
    era(None, "login", "--name", "work", env=home, code=0)
    assert era(server, "sessions", "list", env=home, code=0).stdout == ""  # ERA_SERVER comes before


@pytest.mark.parametrize("url", ["era.example.com", "ftp://x", "http://user:key@127.0.0.1", "http://"])
def test_what_is_no_address(url: str, home: dict[str, str]) -> None:
    assert "address" in era(None, "login", url, env=home, code=2).stderr
    assert not os.path.exists(home["XDG_CONFIG_HOME"])


def test_names_that_there_are_not(home: dict[str, str]) -> None:
    assert "era login URL" in era(None, "sessions", "list", "--server", "none", env=home, code=2).stderr
    assert "no server" in era(None, "logout", "none", env=home, code=2).stderr
    file = Path(home["XDG_CONFIG_HOME"]) / "era" / "servers.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    assert str(file) in era(None, "sessions", "list", env=home, code=2).stderr


def completed(*words: str, server: Server | None = None) -> list[str]:
    return era(server, "completion", "--words", *words, code=0).stdout.split()


def test_completion(server: Server) -> None:
    era(server, "sessions", "create", "python", "shop", code=0)
    assert {"run", "runs"} <= set(completed("ru"))
    assert completed("sessions", "cr") == ["create"]
    assert "--session" in completed("run", "--se")
    assert completed("sessions", "get", "", server=server) == ["shop"]
    assert completed("run", "-s", "sh", server=server) == ["shop"]
    assert completed("inbox", "list", "shop", "--status", "fa") == ["failed"]
    assert completed("run", "x.py", "") == []  # the shell offers files
    assert completed("nonsense", "") == []
    assert completed("sessions", "get", "") == []  # no server answers
    assert {"bash", "zsh", "fish"} <= set(completed("completion", ""))


def test_bash_completes(server: Server) -> None:
    era(server, "sessions", "create", "python", "shop", code=0)
    script = f"""
        eval "$({ERA} completion bash)"
        COMP_WORDS=({ERA} sessions ge); COMP_CWORD=2; _era; echo "${{COMPREPLY[@]}}"
        COMP_WORDS=({ERA} files list ''); COMP_CWORD=3; _era; echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment(server), timeout=60)
    assert done.stdout.split() == ["get", "shop"], done.stderr


def test_each_command_has_help_with_examples() -> None:
    from era.client.grammar import COMMANDS, Parser, commands_below, parser_of

    def walk(parser: Parser) -> None:
        groups = commands_below(parser)
        if groups is None:
            assert parser.description, parser.prog
            assert f"  {parser.prog.split()[0]} " in (parser.epilog or ""), parser.prog
            assert parser.prog in parser.format_help()
        for below in (groups or {}).values():
            assert isinstance(below, Parser)
            walk(below)

    for name in COMMANDS:
        walk(parser_of(name))
