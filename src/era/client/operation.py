"""`era backup`, `restore`, `check`, `migrate` and `gc`: for a server's data directory, without its API."""

from __future__ import annotations

import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from era.client.command import Command, argument
from era.client.output import Advance, Failure, notice, print_json, progress
from era.client.serve import server_extra, settings_of


def backup(named: Any) -> int:
    with server_extra():
        from era.operation.backup import back_up
    with _shown("Backing up") as shown, _failing():
        made = back_up(_server(named), named.target, shown, without_content=named.without_content)
    if named.json:
        print_json({"target": str(named.target), **made.model_dump(exclude={"format", "era", "sums"})})
    else:
        print(f"{named.target}: {made.files} files, {made.bytes} bytes, as of {made.made_at}")
    if made.blobs == "s3":
        notice(
            "the content of files is in S3, and not in this backup: keep the bucket, with old versions of its objects"
        )
    for path, why in made.problems.items():
        notice(f"{path} {why}")
    if made.problems:
        notice("the rest is backed up; `era check` tells what needs these")
    return 1 if made.problems else 0


def restore(named: Any) -> int:
    with server_extra():
        from era.operation.backup import restore
    server = _server(named)
    with _shown("Restoring") as shown, _failing():
        about = restore(named.backup, server, shown)
    if named.json:
        print_json({"data_dir": str(server.directory), **about.model_dump()})
    else:
        print(f"{server.directory}: {about.files} files, {about.bytes} bytes, as of {about.made_at}")
    if about.blobs == "s3":
        notice("the content of files is in S3: start the server with the same ERA_BLOBS")
    for path, why in about.problems.items():
        notice(f"{path} was not in the backup: when that was made, it {why.replace('is ', 'was ', 1)}")
    return 0


def check(named: Any) -> int:
    with server_extra():
        from era.operation.backup import ABOUT
        from era.operation.check import check
        from era.server.directory_locks import exclusive
    if named.backup and not named.repair:
        raise Failure("--from is for --repair.")
    if named.backup and not (named.backup / ABOUT).is_file():
        raise Failure(f"{named.backup} is no backup: it has no {ABOUT}.")
    server = _server(named)
    with ExitStack() as held, _failing():
        if named.repair and server.directory.is_dir():
            held.enter_context(exclusive(server.directory))
        shown = held.enter_context(_shown("Checking"))
        without = named.without_content
        report = check(server, shown, repair=named.repair, backup=named.backup, without_content=without)
    if report.content == "skipped":
        notice("the content of files is in S3, and was not looked at")
    if named.json:
        print_json(report.as_json())
        return 1 if report.problems else 0
    for done in report.repaired:
        print(f"repaired  {done}")
    for problem in report.problems:
        print(f"problem   {problem.what} {problem.why}")
        for who in problem.affects:
            print(f"          needed by {who}")
    print(f"{report.blobs} blobs, {report.bytes} bytes, {len(report.problems)} problems")
    return 1 if report.problems else 0


def migrate(named: Any) -> int:
    with server_extra():
        from era.operation.rows import migrate
        from era.server.directory_locks import exclusive
    secret = settings_of().database_url
    target = named.target or (secret and secret.get_secret_value())
    if not target:
        raise Failure("Name the database: era migrate SOURCE postgresql://USER@HOST/DATABASE, or ERA_DATABASE_URL.")
    directory = named.source.resolve()
    if not directory.is_dir():
        raise Failure(f"There is no data directory {directory}.")
    with exclusive(directory), _failing():
        moved = migrate(directory, target)
    if named.json:
        print_json({"target": moved.target, "rows": moved.rows})
        return 0
    for table, count in moved.rows.items():
        print(f"{count:>9}  {table}")
    print(f"moved to {moved.target}: start the server with ERA_DATABASE_URL and --data-dir {directory}")
    return 0


def gc(named: Any) -> int:
    import asyncio

    with server_extra():
        from era.app import collect
    directory = _data_dir(named)
    settings = settings_of(data_dir=directory)
    kept = settings.shared_dir or directory
    if not kept.is_dir() or (not (kept / "era.sqlite").is_file() and settings.database_url is None):
        raise Failure(f"There is no data directory {kept}.\n     --data-dir names the server's ERA_DATA_DIR.")
    with _failing():
        removed = asyncio.run(collect(settings))
    if named.json:
        print_json({"removed_blobs": removed})
    else:
        print(f"{removed} blobs removed")
    return 0


def _server(named: Any) -> Any:
    """The ServerData that the options and the ERA_ variables of a server name."""
    with server_extra():
        from era.operation.server_data import ServerData
    settings = settings_of() if named.data_dir is None else settings_of(data_dir=named.data_dir)
    database_url = settings.database_url.get_secret_value() if settings.database_url else None
    return ServerData(settings.data_dir.resolve(), database_url, settings.blobs)


def _data_dir(named: Any) -> Path:
    if named.data_dir is not None:
        return Path(named.data_dir)
    return settings_of().data_dir


@contextmanager
def _shown(title: str) -> Iterator[Callable[[int], Advance]]:
    """What begins a progress bar, which ends with the block."""
    with ExitStack() as bars:
        yield lambda total: bars.enter_context(progress(title, total))


@contextmanager
def _failing() -> Iterator[None]:
    """Tell what the disk or the database says as a Failure. SIGTERM ends a command as Ctrl-C does, cleaning up."""
    signal.signal(signal.SIGTERM, _ended)
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise Failure(f"{where}{error.strerror or error}", code="disk") from None
    except sqlite3.Error as error:
        raise Failure(f"The database can't be read: {error}", code="database") from None


def _ended(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


_DIRECTORY = argument("--data-dir", type=Path, metavar="DIR", help="the server's data directory (ERA_DATA_DIR)")

COMMANDS = {
    "backup": Command(
        "Back up a server's data, as of one moment, while the server runs or not.\n\nRows in PostgreSQL and content in "
        "S3 are in it, too: set ERA_DATABASE_URL, ERA_BLOBS and AWS_… as for the server. TARGET becomes a directory, "
        "with SHA256SUMS of all that is in it. It holds people's data and the server's keys: keep it as safe as the "
        "data directory. Run this as the server's user.\n\nLeaves with 0; with 1 if the backup was made "
        "but the data directory lacks content that it names; with 2 if none was made.",
        backup,
        ["era backup /backups/monday", "era backup --data-dir /var/lib/era /backups/monday --json"],
        [
            argument("target", type=Path, metavar="TARGET", help="directory to make; must not be there yet"),
            _DIRECTORY,
            argument("--without-content", action="store_true", help="leave out content that is in S3"),
        ],
    ),
    "restore": Command(
        "Make a data directory of a backup.\n\nWith ERA_DATABASE_URL its rows get into that database of PostgreSQL, "
        "which must have none, and with ERA_BLOBS its content into that prefix of a bucket, which must be empty; "
        "wherever they were before. Every file is verified first. If any is damaged, each is named and nothing is "
        "restored. Run this as the server's user.\n\nLeaves with 0, or with 2 if nothing was restored.",
        restore,
        ["era restore /backups/monday --data-dir /var/lib/era"],
        [argument("backup", type=Path, metavar="TARGET", help="directory that `era backup` made"), _DIRECTORY],
    ),
    "check": Command(
        "Check whether a server's rows and content agree, while the server runs or not.\n\nReads all content, in S3 as "
        "well: set ERA_DATABASE_URL, ERA_BLOBS and AWS_… as for the server. "
        "--repair, on a stopped server, moves damaged content aside (into damaged/), and with --from brings back what "
        "a backup has of it.\n\nLeaves with 0 if all is well, with 1 if problems are left.",
        check,
        ["era check --data-dir /var/lib/era", "era check --repair --from /backups/monday"],
        [
            _DIRECTORY,
            argument("--repair", action="store_true", help="put right what can be without losing anything"),
            argument("--from", dest="backup", type=Path, metavar="BACKUP", help="a backup to bring content back from"),
            argument("--without-content", action="store_true", help="don't look at content that is in S3"),
        ],
    ),
    "migrate": Command(
        "Move the rows of a stopped server from its data directory to PostgreSQL.\n\nTARGET must have no rows yet. All "
        "are copied and counted in one transaction; then SOURCE/era.sqlite becomes era.sqlite.moved, and SOURCE notes "
        "where its rows are. The content of files and programs' SQL databases stay in SOURCE. Start the server with "
        "ERA_DATABASE_URL and the same data directory afterwards.\n\nOthers on this machine can see a command's "
        "arguments: leave TARGET out and set ERA_DATABASE_URL, or the password out and have it in ~/.pgpass.\n\nLeaves "
        "with 0, or with 2 if nothing was moved.",
        migrate,
        [
            "era migrate /var/lib/era postgresql://era@db.example.com/era",
            "ERA_DATABASE_URL=postgresql://era:secret@db.example.com/era era migrate /var/lib/era",
        ],
        [
            argument("source", type=Path, metavar="SOURCE", help="the server's data directory (ERA_DATA_DIR)"),
            argument("target", nargs="?", metavar="TARGET", help="URL of the database (ERA_DATABASE_URL)"),
        ],
    ),
    "gc": Command(
        "Remove content that nothing needs any more from the data directory of a stopped server.\n\nA server does this "
        "by itself once an hour, an hour late. Set the same ERA_ variables as for the server: they say what is kept.",
        gc,
        ["era gc --data-dir /var/lib/era"],
        [_DIRECTORY],
    ),
}
