"""Backups of a data directory, taken while its server runs or not.

Theory of operation. First collections of garbage are held off: the server removes blobs only while it has the lock of
their directory to itself, and a backup shares that lock to its end, however it ends. Then the rows are copied in one
transaction, which is the moment that the backup shows. Whatever those rows name was stored before them and can't be
removed now; blobs never change, so they are copied at leisure, each verified against its name. A blob that is missing
or damaged in the data directory itself is named, and the rest is backed up all the same: that is when it's needed most.

A backup is a directory: `era.sqlite`, `blobs/`, `storage/sql/` and keys as in a data directory, `SHA256SUMS` of all
of these (as `sha256sum` writes and checks it), and `backup.json`, which has the digest of that list and so closes it.
It is written beside its place and renamed when it is complete and durable.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from era import __version__
from era.core.models import now, timestamp
from era.errors import BadRequest
from era.operation import contents
from era.operation.contents import Advance
from era.operation.placing import check_free, placing

SUMS = "SHA256SUMS"
ABOUT = "backup.json"
FORMAT = 1
_BUSY_SECONDS = 60.0
_MOST_NAMED = 20

type Progress = Callable[[int], Advance]
"""Begins to show progress, of so many bytes in all."""


@dataclass(frozen=True, slots=True)
class Made:
    """A backup that was made. `problems` are blobs that the data directory itself lacks, or has damaged, by path."""

    made_at: str
    files: int
    bytes: int
    blobs: str
    """`here`, or `s3` where the content is in a bucket and not in the backup."""

    problems: dict[str, str]


def back_up(directory: Path, target: Path, progress: Progress) -> Made:
    """Back up a data directory into `target`, which must not be there yet. Raises NotFound where there is no such data
    directory, Conflict for a target that is there or rows in PostgreSQL, OSError, sqlite3.Error."""
    directory = directory.resolve()
    contents.check_rows_are_here(directory)
    check_free(target)
    if target.resolve().is_relative_to(directory):
        raise BadRequest("A backup can't be in the data directory itself.", hint="Name another place, on another disk.")
    in_s3 = (directory / contents.STORE_ID).exists()
    with nullcontext() if in_s3 else held_off(directory), placing(target) as draft:
        made_at = timestamp(now())
        copy_rows(directory / contents.DATABASE, draft / contents.DATABASE)
        sums = {contents.DATABASE: contents.digest_of(draft / contents.DATABASE)}
        for name in contents.KEYS:
            if (directory / name).exists():
                sums[name], _ = contents.copy(directory / name, draft / name)
        for path in contents.databases(directory):
            if copy_database(directory / path, draft / path):
                sums[path] = contents.digest_of(draft / path)
        problems: dict[str, str] = {}
        if not in_s3:
            _copy_blobs(directory, draft, sums, problems, progress)
        size = contents.sizes(draft, sums)
        lines = "".join(f"{digest}  {path}\n" for path, digest in sorted(sums.items()))
        _write(draft / SUMS, lines)
        about = {
            "format": FORMAT,
            "era": __version__,
            "made_at": made_at,
            "files": len(sums),
            "bytes": size,
            "blobs": "s3" if in_s3 else "here",
            "problems": problems,
            "sums": hashlib.sha256(lines.encode()).hexdigest(),
        }
        _write(draft / ABOUT, json.dumps(about, indent=1) + "\n")
    return Made(made_at, len(sums), size, "s3" if in_s3 else "here", problems)


def _copy_blobs(
    directory: Path, draft: Path, sums: dict[str, str], problems: dict[str, str], progress: Progress
) -> None:
    """Copy the blobs that the rows in `draft` name, and note the digest or the problem of each."""
    found = contents.walk(contents.named(draft / contents.DATABASE), directory)
    paths = [contents.blob_path(digest) for digest in sorted(found.needed)]
    advance = progress(contents.sizes(directory, paths))
    for path in paths:
        try:
            digest, _ = contents.copy(directory / path, draft / path, advance)
        except FileNotFoundError:
            problems[path] = "is missing"
            continue
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            problems[path] = f"can't be read: {error.strerror}"
            (draft / path).unlink(missing_ok=True)
            continue
        name = path.rpartition("/")[2]
        if digest == name:
            sums[path] = digest
            if name in found.problems:  # it was stored like this
                problems[path] = found.problems[name]
        else:
            problems[path] = "has other content than its name says"
            (draft / path).unlink()


@contextmanager
def held_off(directory: Path) -> Iterator[None]:
    """Keep the server's collections of garbage off; waits for one that is under way."""
    (directory / "blobs").mkdir(mode=0o700, exist_ok=True)
    lock = os.open(directory / "blobs", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield
    finally:
        os.close(lock)


def copy_rows(source: Path, target: Path) -> None:
    """Copy the database as of one moment, while its server writes to it. What was deleted from it isn't copied."""
    with closing(sqlite3.connect(f"{source.as_uri()}?mode=rw", uri=True, timeout=_BUSY_SECONDS)) as connection:
        connection.isolation_level = None
        connection.execute("VACUUM INTO ?", (str(target),))
    target.chmod(0o600)


def copy_database(source: Path, target: Path) -> bool:
    """Copy a program's SQL database as of one moment; False where it has been dropped meanwhile.

    Page by page: its schema is a stranger's, and nothing of it is executed.
    """
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with (
            closing(sqlite3.connect(f"{source.as_uri()}?mode=rw", uri=True, timeout=_BUSY_SECONDS)) as connection,
            closing(sqlite3.connect(target)) as made,
        ):
            connection.backup(made)
    except sqlite3.OperationalError:
        target.unlink(missing_ok=True)
        if source.exists():
            raise
        return False
    target.chmod(0o600)
    return True


def _write(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
        file.write(text)


def read_about(backup: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a backup says of itself, and the digests of its files by path. Raises BadRequest for what is no backup or
    can't be believed."""
    try:
        about = json.loads((backup / ABOUT).read_bytes())
    except FileNotFoundError:
        raise BadRequest(f"{backup} is no backup: it has no {ABOUT}.") from None
    except ValueError:
        raise damaged(backup, {ABOUT: "isn't JSON"}) from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise BadRequest(f"{backup} is no backup that this version of ERA can read.")
    try:
        lines = (backup / SUMS).read_bytes()
    except FileNotFoundError:
        raise damaged(backup, {SUMS: "is missing"}) from None
    sums: dict[str, str] = {}
    if hashlib.sha256(lines).hexdigest() != about.get("sums"):
        raise damaged(backup, {SUMS: f"has another digest than {ABOUT} says"})
    for line in lines.decode().splitlines():
        digest, _, path = line.partition("  ")
        if not contents.DIGEST.fullmatch(digest) or not _may_be(path):
            raise damaged(backup, {SUMS: "names what no backup has"})
        sums[path] = digest
    return about, sums


def _may_be(path: str) -> bool:
    """Whether a backup may have a file of this path. Nothing that is restored gets elsewhere."""
    parts = path.split("/")
    if path == contents.DATABASE or path in contents.KEYS:
        return True
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        return False
    if parts[0] == "blobs":
        return len(parts) == 3 and bool(contents.DIGEST.fullmatch(parts[2])) and parts[1] == parts[2][:2]
    return len(parts) == 4 and parts[:2] == contents.SQL.split("/") and path.endswith(".sqlite")


def restore(backup: Path, directory: Path, progress: Progress) -> dict[str, Any]:
    """Make a data directory of a backup; what that says of itself. Raises Conflict where there is something already,
    BadRequest with every damaged file for a damaged backup, OSError. Nothing is there then."""
    check_free(directory)
    about, sums = read_about(backup)
    if contents.DATABASE not in sums:
        raise damaged(backup, {contents.DATABASE: "is missing"})
    advance = progress(contents.sizes(backup, sums))
    problems: dict[str, str] = {}
    with placing(directory) as draft:
        for path, expected in sums.items():
            source = backup / path
            try:
                if source.is_symlink() or not source.is_file():
                    problems[path] = "is missing" if not source.exists() else "isn't a file"
                elif contents.copy(source, draft / path, advance)[0] != expected:
                    problems[path] = "is damaged: its digest is another"
            except OSError as error:
                if error.errno == errno.EIO or error.filename == str(source):
                    problems[path] = f"can't be read: {error.strerror}"
                else:
                    raise
        if problems:
            raise damaged(backup, problems)
    return about


def damaged(backup: Path, problems: dict[str, str]) -> BadRequest:
    """The error for a damaged backup, which names its files."""
    named = [f"{path} {why}" for path, why in sorted(problems.items())]
    more = f"; and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
    return BadRequest(
        f"{backup} is damaged: {'; '.join(named[:_MOST_NAMED])}{more}.",
        hint="Nothing was restored. Use another backup, or another copy of this one; --json names every file.",
        code="damaged_backup",
        details=problems,
    )
