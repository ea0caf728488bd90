"""`era push` and `era pull`: a directory into a session and back, changed files only."""

from __future__ import annotations

from typing import Any

from era.client.command import Command, argument
from era.client.output import notice, print_json, progress
from era.client.servers import connect
from era.sdk.directories import Synced


def push(named: Any) -> None:
    with connect(named) as era, progress(f"push {named.session}") as advance:
        files = era.sessions.named(named.session).files
        done = files.push(named.directory, delete=named.delete, progress=advance)
    _print(named, done, "pushed")
    if done.left_out:
        notice(f"{done.left_out} files of the session's git or with names that aren't UTF-8 were not deleted")


def pull(named: Any) -> None:
    with connect(named) as era, progress(f"pull {named.session}") as advance:
        files = era.sessions.named(named.session).files
        done = files.pull(named.directory, delete=named.delete, progress=advance)
    _print(named, done, "pulled")
    if done.left_out:
        notice(f"{done.left_out} links, unreadable files, files of git's or names that aren't UTF-8 were not pulled")


def _print(named: Any, done: Synced, word: str) -> None:
    if named.json:
        print_json(done._asdict())
    else:
        print(f"{len(done.copied)} files {word}, {len(done.deleted)} deleted, {done.total} in all")


_ARGUMENTS = (argument("directory", metavar="DIRECTORY"), argument("-s", "--session", required=True))

COMMANDS = {
    "push": Command(
        "Copy the files of DIRECTORY into a session.\n\nOnly those that differ there or are missing are sent, and "
        "they arrive all or none. What .gitignore files\nleave out stays here, and so do `.git` and links.",
        push,
        ["era push . --session app", "era push src --session app --delete"],
        [
            argument(
                "--delete",
                action="store_true",
                help="delete what the session has and DIRECTORY hasn't, but for the session's own .git",
            ),
            *_ARGUMENTS,
        ],
    ),
    "pull": Command(
        "Copy a session's files into DIRECTORY, which is made if it doesn't exist.\n\nOnly those that differ here "
        "or are missing are fetched. Nothing outside of DIRECTORY is ever written,\nwhatever the session's files "
        "are called. Links and .git are not pulled.",
        pull,
        ["era pull results --session app", "era pull . --session app --delete"],
        [
            argument(
                "--delete",
                action="store_true",
                help="delete what DIRECTORY has and the session hasn't, but for what its .gitignore files leave out",
            ),
            *_ARGUMENTS,
        ],
    ),
}
