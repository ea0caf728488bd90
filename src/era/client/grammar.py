"""The grammar of the command: which commands there are, and how a command's words become a call of its function.

GROUPS names the commands, and the module of each. The module has a table COMMANDS with a Command or Group for each of
its names. It is imported only when its command is called, or its words are completed.

argparse and not a library of more comfort: it takes 10 ms to import where those take 100, and a command in a shell's
loop pays that each time.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from era.client.command import Command, Group
from era.client.output import Failure
from era.common.spelling import nearest

GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "Run code": {
        "run": ("run", "Run a program and leave with its exit code"),
        "exec": ("run", "Run a command in a session"),
        "runs": ("runs", "List, follow and stop runs"),
    },
    "Processes beside runs": {
        "shell": ("processes", "Open a shell in a session"),
        "ps": ("processes", "List a session's processes"),
        "logs": ("processes", "Print what a process has written"),
        "kill": ("processes", "End a process, or send it a signal"),
        "url": ("sessions", "Print the public address of a session's port"),
        "stop": ("sessions", "End a session's processes and commit what they left"),
        "checkpoint": ("processes", "Make a live session's files its next version"),
        "contexts": ("processes", "List, interrupt, restart and delete interpreters that stay"),
    },
    "Sessions": {
        "sessions": ("sessions", "Create, list, show, change, copy and delete sessions"),
        "files": ("files", "List, read, write, move and remove a session's files"),
        "versions": ("sessions", "Look at a session's past, and go back to it"),
        "setup": ("sessions", "Follow the installing of a session's packages"),
        "push": ("files", "Copy a directory into a session"),
        "pull": ("files", "Copy a session's files into a directory"),
        "export": ("files", "Write a whole session into one file"),
        "import": ("files", "Create a session from such a file"),
        "inbox": ("webhooks", "Webhooks that are stored first, then run in order"),
    },
    "Storage": {"storage": ("storage", "Keys, SQL and objects that sessions share")},
    "Servers": {
        "serve": ("serve", "Serve the HTTP API"),
        "cluster": ("cluster", "Serve the HTTP API by several hosts on this machine"),
        "host": ("cluster", "List, drain and start the hosts on the nodes of a Ray cluster"),
        "backup": ("operation", "Back up a server's data directory"),
        "restore": ("operation", "Make a data directory of a backup"),
        "check": ("operation", "Check whether a data directory is whole"),
        "migrate": ("operation", "Move a server's rows to PostgreSQL"),
        "gc": ("operation", "Remove content that nothing needs any more"),
        "doctor": ("serve", "Report which isolation works on this machine"),
        "login": ("login", "Remember a server and its key"),
        "logout": ("login", "Forget a server"),
        "keys": ("owners", "Create, list, change, rotate and revoke API keys"),
        "quotas": ("owners", "Show and set how much owners may use"),
        "usage": ("owners", "Show what owners have used on each day"),
        "audit": ("owners", "Show who did what"),
        "webhooks": ("webhooks", "Have a server tell what happens to sessions"),
        "mcp": ("serve", "Serve tools to a model on standard input and output"),
        "bench": ("login", "Measure a server"),
        "completion": ("completion", "Print completion for a shell"),
    },
}
COMMANDS = {name: entry for group in GROUPS.values() for name, entry in group.items()}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """As wide as the terminal. argparse makes one for each option and would ask `shutil`, whose import takes long."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_columns() - 2)


def _columns() -> int:
    named = os.environ.get("COLUMNS", "")
    try:
        return int(named) if named.isdecimal() and int(named) else os.get_terminal_size(1).columns or 80
    except OSError:  # it is no terminal
        return 80


class Parser(argparse.ArgumentParser):
    """A parser whose help shows texts as they are written, and whose errors are Failures with the next step."""

    is_program = False

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise Failure(f"{message}\n     {self.prog} --help has examples.")


def _fill(parser: Parser, entry: Command | Group) -> Parser:
    """Give a parser the texts and arguments of a command, or of all commands of a group."""
    if isinstance(entry, Group):
        parser.description = entry.text
        commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser, title="commands")
        for name, below in entry.commands.items():
            summary = below.summary or (below.text[0].lower() + below.text[1:]).removesuffix(".")
            _fill(commands.add_parser(name, help=summary), below)
        return parser
    parser.description = entry.text
    parser.epilog = "examples:\n" + "\n".join(f"  {example}" for example in entry.examples)
    parser.set_defaults(call=entry.call, json=False)
    parser.is_program = entry.is_program
    if entry.has_json:
        parser.add_argument("--json", action="store_true", help="print JSON, as the API answers it")
    parser.add_argument(
        "--server", metavar="NAME|URL", help="a server that `era login` remembers, or an address (ERA_SERVER)"
    )
    for names, options in entry.arguments:
        parser.add_argument(*names, **options)
    return parser


def parser_of(command: str) -> Parser:
    """The parser of a command, whose module is imported for it. Raises Failure if there is no such command."""
    if command not in COMMANDS:
        meant = nearest(command, COMMANDS)
        hint = f"Did you mean `era {meant}`?" if meant else "`era --help` lists the commands."
        raise Failure(f"There is no command '{command[:80]}'.\n     {hint}")
    module, _ = COMMANDS[command]
    return _fill(Parser(prog=f"era {command}"), import_module(f"era.client.{module}").COMMANDS[command])


def carry_out(words: Sequence[str]) -> int:
    """Do what the words of a command say; its exit code. Raises Failure or EraError."""
    command, *rest = words or ["--help"]
    if command in ("--help", "-h", "help"):
        if command == "help" and rest:
            return carry_out([*rest, "--help"])
        print(overview())
        return 0
    parser: argparse.ArgumentParser = parser_of(command)
    # Not by the parser of the group, which lets no options stand among the words of its commands.
    while (below := commands_below(parser)) is not None and rest and rest[0] in below:
        parser = below[rest.pop(0)]
    words = []
    if isinstance(parser, Parser) and parser.is_program:
        rest, words = _program(parser, rest)
    rest, behind = _split(rest)
    has_program = any(action.dest == "args" for action in parser._actions)
    if behind and below is None and not has_program:  # they are words of the command, whatever they begin with
        rest = [*rest, "--", *behind]
    try:
        named = parser.parse_args(rest) if below is not None else parser.parse_intermixed_args(rest)
    except SystemExit as end:  # help was asked for
        return int(end.code or 0)
    if has_program:
        named.args, named.words = [*named.args, *behind], words
    try:
        return int(named.call(named) or 0)
    finally:
        sys.stdout.flush()


def commands_below(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser] | None:
    """The commands of a group by name; None where the parser is that of a command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return None


def _program(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the words of a command that starts a program.

    Returns:
        Its options, which end at the first other word or with `-c CODE`, and the words of the program.
    """
    takes_value = {name: action.nargs != 0 for action in parser._actions for name in action.option_strings}
    at = 0
    while at < len(words) and words[at].startswith("-") and words[at] != "-":
        word = words[at]
        if word == "--":
            return list(words[:at]), list(words[at + 1 :])
        is_joined = "=" in word if word.startswith("--") else len(word) > 2
        at += 2 if takes_value.get(word) and not is_joined else 1
        if word.startswith("-c"):  # the code, which is the program
            break
    return list(words[:at]), list(words[at:])


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before and behind the first `--`."""
    words = list(words)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def overview() -> str:
    lines = [
        "usage: era COMMAND …",
        "",
        "Run untrusted code in sessions that remember. Start a server with 'era serve', then 'era run hello.py'.",
    ]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<12} {summary}" for name, (_, summary) in commands.items())]
    lines += ["", "'era COMMAND --help' explains one, with examples. 'era --version' prints the version."]
    return "\n".join(lines)
