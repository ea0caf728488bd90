"""`era push` and `era pull`: a directory into a session and back, changed files only."""

from __future__ import annotations

from typing import Any

from era.client.grammar import Parser
from era.client.output import notice, print_json, progress
from era.client.servers import connect
from era.sdk.directories import Synced


def add(parser: Parser) -> None:
    if parser.prog.endswith("push"):
        parser.describe(
            push,
            "Copy the files of DIRECTORY into a session.\n\nOnly those that differ there or are missing are sent, and "
            "they arrive all or none. What .gitignore files\nleave out stays here, and so do `.git` and links.",
            ("era push . --session app", "era push src --session app --delete"),
        )
        parser.add_argument(
            "--delete", action="store_true",
            help="delete what the session has and DIRECTORY hasn't, but for the session's own .git",
        )  # fmt: skip
    else:
        parser.describe(
            pull,
            "Copy a session's files into DIRECTORY, which is made if it doesn't exist.\n\nOnly those that differ here "
            "or are missing are fetched. Nothing outside of DIRECTORY is ever written,\nwhatever the session's files "
            "are called. Links and .git are not pulled.",
            ("era pull results --session app", "era pull . --session app --delete"),
        )
        parser.add_argument(
            "--delete", action="store_true",
            help="delete what DIRECTORY has and the session hasn't, but for what its .gitignore files leave out",
        )  # fmt: skip
    parser.add_argument("directory", metavar="DIRECTORY")
    parser.add_argument("-s", "--session", required=True)


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
