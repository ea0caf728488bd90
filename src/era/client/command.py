"""Commands as entries of tables: how one is called, what its words stand for, and how its answer is printed."""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from json import loads
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

from era.client.output import Failure, notice, print_json, table
from era.sdk.view import View

if TYPE_CHECKING:
    from era.sdk.sync.client import Era
    from era.sdk.sync.sessions import Session


type Call = Callable[[Any], int | None]
"""Carries out a command by its parsed words. Returns the exit code, None for 0."""

type Argument = tuple[tuple[str, ...], dict[str, Any]]
"""The arguments of argparse's `add_argument`."""


class Command(NamedTuple):
    """A command."""

    text: str
    call: Call
    examples: Sequence[str]
    arguments: Sequence[Argument] = ()
    summary: str = ""
    """Its line in the help of its group; left out: the text."""

    has_json: bool = True
    """Whether it has an option --json."""

    is_program: bool = False
    """Whether its options end at the first other word. That word and all behind it are `words`, whatever they begin
    with."""


class Group(NamedTuple):
    """Commands below another word."""

    text: str
    commands: Mapping[str, Command | Group]
    summary: str = ""


def argument(*names: str, **options: Any) -> Argument:
    return names, options


SESSION = argument("session", metavar="SESSION")
LIMIT = argument("-n", "--limit", type=int, metavar="N", help="how many at most")
LIMIT_20 = argument("-n", "--limit", type=int, default=20, metavar="N", help="how many at most (20)")


def calls(
    call: Callable[[Era, Any], Any],
    show: Callable[[Any], object] | None = None,
    *,
    json: Callable[[Any], object] | None = None,
) -> Call:
    """Make a command of a call of the SDK.

    Args:
        call: Makes the call, with a client and the parsed words. Returns None if there is nothing to print.
        show: Prints the answer for people; None: nothing is printed for them.
        json: Makes the JSON for programs; None: the answer as the API gives it.
    """

    def carry_out(named: Any) -> None:
        from era.client.servers import connect  # not for commands that call no server

        with connect(named) as era:
            found = call(era, named)
            if found is None:
                return
            if named.json:
                print_json(json(found) if json else found.answer if isinstance(found, View) else found)
            elif show:
                show(found)

    return carry_out


def lists(
    call: Callable[[Era, Any], Sequence[View]], name: str, columns: Mapping[str, str | Callable[[Any], object]]
) -> Call:
    """Make a command of a call that answers a list: a table for people, `{name: […], "count": …}` for programs.

    Args:
        call: Makes the call, with a client and the parsed words.
        name: The list's name in JSON.
        columns: For each title of a column the field that it shows, or what makes its cell of an item.
    """

    def show(found: Sequence[View]) -> None:
        cells = columns.values()
        rows = [[getattr(item, cell) if isinstance(cell, str) else cell(item) for cell in cells] for item in found]
        table(list(columns), rows)

    return calls(call, show, json=lambda found: {name: [item.answer for item in found], "count": len(found)})


def does(call: Callable[[Era, Any], object], **fields: str) -> Call:
    """Make a command of a call that answers nothing: programs get `{"success": true}` with some of its words.

    Args:
        call: Makes the call, with a client and the parsed words.
        fields: For each field of the JSON the word that it shows.
    """

    def carry_out(era: Era, named: Any) -> dict[str, object]:
        call(era, named)
        return {"success": True, **{field: getattr(named, word) for field, word in fields.items()}}

    return calls(carry_out)


def on_session(call: Callable[[Session, Any], Any]) -> Callable[[Era, Any], Any]:
    """Have a call get the session that the words name in place of the client."""
    return lambda era, named: call(era.sessions.named(named.session), named)


def seconds(text: str) -> float:
    """A number of seconds that an option is. Raises ValueError, which argparse tells."""
    value = float(text)
    if not isfinite(value):
        raise ValueError(text)
    return value


PROGRAM_OPTIONS = (
    argument(
        "-e",
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable for this run only; NAME alone takes the value it has here; may be repeated",
    ),
    argument(
        "--secret",
        action="append",
        default=[],
        metavar="NAME=HOST,…",
        help="the variable NAME that there is here, for these hosts only: the program sees a placeholder",
    ),
    argument("--timeout", type=seconds, metavar="SECONDS", help="how long the run may take"),
    argument("--stdin", metavar="FILE", help="a text file that is its standard input; default: what is piped in here"),
    argument("--cwd", metavar="DIR", help="the directory to start in, below the session's"),
)
"""The options of commands that start a program."""

RUN_OPTIONS = (
    *PROGRAM_OPTIONS,
    argument("--atomic", action="store_true", help="keep data and files only if it ends with 0"),
    argument("--no-record-code", action="store_true", help="leave the code or command out of the run's record"),
    argument("-b", "--background", action="store_true", help="print the run's id and leave it running"),
    argument("--idempotency-key", metavar="KEY", help="run it once, however often this command is given with this key"),
)
"""The options of commands that start a run."""


def run_options(named: Any, *, is_run: bool = True) -> dict[str, Any]:
    """Return the arguments of the SDK that RUN_OPTIONS stand for. A run gets what is piped into this command.

    Args:
        named: The parsed words.
        is_run: False for a process, which has none of the options that only runs have.

    Raises:
        Failure: A file can't be read, or a value isn't there.
    """
    options: dict[str, Any] = {"env": dict(map(variable, named.env))}
    if named.secret:
        options["secrets"] = dict(map(secret, named.secret))
    if named.timeout is not None:
        options["timeout"] = named.timeout
    if named.cwd is not None:
        options["cwd"] = named.cwd
    if not is_run:
        return options
    stdin = piped_text() if named.stdin is None else text_of(named.stdin)
    if stdin is not None:
        options["stdin"] = stdin
    if named.idempotency_key is not None:
        options["idempotency_key"] = named.idempotency_key
    if named.atomic:
        options["atomic"] = True
    if named.no_record_code:
        options["record_code"] = False
    return options


_STDIN_NOTICE_SECONDS = 2.0
"""How long standard input may be silent before the command says that it waits for it."""


def piped_text() -> str | None:
    """Return what is piped into this command. None if nothing is: standard input is a terminal, a device or closed.

    Raises:
        Failure: It isn't text.
    """
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return None
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)):
        return None
    if not select.select([0], [], [], _STDIN_NOTICE_SECONDS)[0]:
        notice("waiting for the end of standard input, which the program gets; </dev/null gives it none")
    return text_of("-") or None


def text_of(file: str) -> str:
    """The text of a file, with its own line ends; `-` is standard input. Raises Failure."""
    try:
        if file == "-":
            return sys.stdin.buffer.read().decode()
        with open(file, encoding="utf-8", newline="") as opened:
            return opened.read()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{file} can't be read: {error}") from None


def json_object(text: str | None, option: str) -> dict[str, Any] | None:
    """The JSON object that an option is. Raises Failure."""
    if text is None:
        return None
    try:
        value = _parsed(text)
    except (ValueError, RecursionError) as error:
        raise Failure(f"{option} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Failure(f"{option} is not a JSON object.")
    return value


def json_or_text(text: str) -> Any:
    """A JSON value, or the text itself where it is none."""
    try:
        return _parsed(text)
    except (ValueError, RecursionError):
        return text


def _parsed(text: str) -> Any:
    """The value of JSON, which isn't more than can be sent on as such. Raises ValueError, RecursionError."""
    return loads(text, parse_constant=_no_json, parse_float=_finite)


def _no_json(word: str) -> Any:
    """What Python reads as JSON and is none: NaN, Infinity."""
    raise ValueError(f"{word} is not JSON")


def _finite(word: str) -> float:
    """A number, which must not be so large that Python takes it for infinite."""
    value = float(word)
    return value if isfinite(value) else _no_json(word)


def labels(items: list[str]) -> dict[str, str]:
    """NAME=VALUE, several times. Raises Failure."""
    for item in items:
        if "=" not in item:
            raise Failure(f"'{item}' has no value: it is NAME=VALUE.")
    return {name: value for name, _, value in (item.partition("=") for item in items)}


def secret(item: str) -> tuple[str, dict[str, Any]]:
    """The name and the API's value of one --secret. Raises Failure."""
    name, _, hosts = item.partition("=")
    if not hosts:
        raise Failure("--secret wants a name and hosts: NAME=api.example.com.")
    if name not in os.environ:
        raise Failure(f"--secret {name} has no value: there is no variable {name} here.")
    return name, {"value": os.environ[name], "hosts": hosts.split(",")}


def variable(item: str) -> tuple[str, str]:
    """The name and value of one --env. Raises Failure."""
    name, equals, value = item.partition("=")
    if not equals:
        if name not in os.environ:
            raise Failure(f"--env {name} has no value, and there is no variable {name} here.")
        value = os.environ[name]
    return name, value


def quotas_of(words: list[str]) -> dict[str, int | None]:
    """Quotas by name, of words like `sessions=10`; `none` takes one back. Raises Failure."""
    found: dict[str, int | None] = {}
    for word in words:
        name, _, value = word.partition("=")
        if not name or not (value == "none" or value.isdecimal()):
            raise Failure(f"'{word[:80]}' is no quota.\n     Write NAME=N, such as sessions=10, or NAME=none.")
        found[name] = None if value == "none" else int(value)
    return found
