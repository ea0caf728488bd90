"""Capsules between a server and a file, for the `era` command, with a bar on a terminal that shows how far they are."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

import httpx

_CHUNK = 256 << 10
type Advance = Callable[[int], None]


class TransferFailed(Exception):
    """What to tell the user."""


def download(response: httpx.Response, target: Path | None, title: str) -> int:
    """Keep a response's body as `target`, all of it or nothing; None is standard output. How many bytes it had."""
    declared = response.headers.get("content-length")
    with progress(title, int(declared) if declared else None) as advance:
        if target is None:
            return _copy_to_stdout(response, advance)
        part = target.with_name(f"{target.name}.part")
        try:
            with part.open("wb") as file:
                size = _copy(response, file, advance)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        except OSError as error:
            raise TransferFailed(f"{target} can't be written: {error.strerror}") from None
        finally:
            with suppress(OSError):
                part.unlink()
        return size


@contextmanager
def upload(source: Path | None, title: str) -> Iterator[dict[str, Any]]:
    """What a request needs to send `source`; None is standard input."""
    try:
        opened = nullcontext(sys.stdin.buffer) if source is None else source.open("rb")
    except OSError as error:
        raise TransferFailed(f"{source} can't be read: {error.strerror}") from None
    headers = {"Content-Type": "application/x-tar"}
    with opened as file:
        size = None if source is None else os.fstat(file.fileno()).st_size
        if size is not None:
            headers["Content-Length"] = str(size)
        with progress(title, size) as advance:
            yield {"headers": headers, "content": _pieces(file, source, advance)}


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Advance]:
    """Tells how far something is; says nothing where nobody would see it."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda size: bar.advance(task, size)


def _copy_to_stdout(response: httpx.Response, advance: Advance) -> int:
    try:
        size = _copy(response, sys.stdout.buffer, advance)
        sys.stdout.flush()
        return size
    except OSError as error:
        # What is left in the buffer must go somewhere when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise TransferFailed(f"standard output can't be written: {error.strerror}") from None


def _copy(response: httpx.Response, file: IO[bytes], advance: Advance) -> int:
    size = 0
    for chunk in response.iter_bytes(_CHUNK):
        file.write(chunk)
        size += len(chunk)
        advance(len(chunk))
    return size


def _pieces(file: IO[bytes], source: Path | None, advance: Advance) -> Iterator[bytes]:
    try:
        while piece := file.read(_CHUNK):
            yield piece
            advance(len(piece))
    except OSError as error:
        raise TransferFailed(f"{source or 'standard input'} can't be read: {error.strerror}") from None
