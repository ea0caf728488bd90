"""Commands as entries of tables: how one is called, what it does, and how its answer is printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from era.client.output import print_json, table
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
