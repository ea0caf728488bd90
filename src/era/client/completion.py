"""`era completion`: what a shell offers while somebody types. The shell asks the command itself each time."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from era.client import grammar
from era.client.command import Command, argument
from era.client.grammar import commands_below, parser_of
from era.client.output import Failure
from era.errors import EraError

_SCRIPTS = {
    "bash": """_era() {
  local IFS=$'\\n'
  COMPREPLY=($("${COMP_WORDS[0]}" completion --words "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _era era""",
    "zsh": """#compdef era
_era() {
  local -a found
  found=("${(@f)$("${words[1]}" completion --words "${(@)words[2,CURRENT]}" 2>/dev/null)}")
  if [[ -n "$found" ]]; then compadd -a found; else _files; fi
}
compdef _era era""",
    "fish": "complete -c era -a '(era completion --words (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'",
}
_ASK_SECONDS = 1.0
_MOST = 200


def completion(named: Any) -> None:
    if named.words is not None:
        for word in candidates(named.words):
            print(word)
    elif named.shell is None:
        raise Failure("Which shell?\n     era completion bash, zsh or fish")
    else:
        print(_SCRIPTS[named.shell])


def candidates(words: list[str]) -> list[str]:
    """What the last of a command's words may become. Nothing leaves it to the shell, which completes files."""
    *before, last = words or [""]
    if not before:
        return _starting(grammar.COMMANDS, last)
    try:
        parser: argparse.ArgumentParser = parser_of(before[0])
    except Failure:
        return []
    position, waiting = 0, None
    for word in before[1:]:
        if waiting is not None:
            waiting = None
        elif word == "--":
            return []
        elif word.startswith("-") and word != "-":
            action = parser._option_string_actions.get(word)
            waiting = action if action is not None and action.nargs is None else None
        else:
            groups = commands_below(parser)
            if groups is not None and word in groups:
                parser, position = groups[word], 0
            else:
                position += 1
    if waiting is not None:
        return _values(waiting, last)
    if last.startswith("-"):
        options = [o for o in parser._option_string_actions if o.startswith("--") or len(last) < 2]
        return _starting(options, last)
    groups = commands_below(parser)
    if groups is not None:
        return _starting(groups, last)
    places = [action for action in parser._actions if not action.option_strings]
    return _values(places[min(position, len(places) - 1)], last) if places else []


def _values(action: argparse.Action, last: str) -> list[str]:
    if action.choices is not None:
        return _starting([str(choice) for choice in action.choices if choice is not None], last)
    return _starting(_sessions(), last) if action.dest in ("session", "sessions") else []


def _sessions() -> list[str]:
    """Ids of the newest sessions; none where no server answers at once."""
    from era.client.servers import connect

    try:
        with connect(SimpleNamespace(server=None), timeout=_ASK_SECONDS, retries=0) as era:
            return [info.id for info in era.sessions.infos(_MOST)]
    except (Failure, EraError):
        return []


def _starting(names: Iterable[str], start: str) -> list[str]:
    return [name for name in names if name.startswith(start)]


COMMANDS = {
    "completion": Command(
        "Print a script that completes commands, options and sessions in a shell.",
        completion,
        [
            'eval "$(era completion bash)"    # in ~/.bashrc',
            'eval "$(era completion zsh)"     # in ~/.zshrc, behind compinit',
            "era completion fish > ~/.config/fish/completions/era.fish",
        ],
        [
            argument("shell", metavar="SHELL", nargs="?", choices=(*_SCRIPTS, None), help=", ".join(_SCRIPTS)),
            argument("--words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS),
        ],
        has_json=False,
    )
}
