"""Downloads into a file and uploads from one, with a progress bar where standard error is a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from era.client.failure import Failure

if TYPE_CHECKING:
    import httpx

_CHUNK = 256 << 10

type Advance = Callable[[int], None]
"""Moves a progress bar on by a number of bytes."""


def download(response: httpx.Response, target: Path | None, title: str) -> int:
    """Write a response's body to a file, all of it or nothing.

    Parameters
    ----------
    response
        A streamed response whose body hasn't been read.
    target
        The file, which is replaced; None is standard output.
    title
        Stands beside the progress bar.

    Returns
    -------
    int
        The size of the body in bytes.

    Raises
    ------
    Failure
        The file or standard output can't be written.
    """
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
            raise Failure(f"{target} can't be written: {error.strerror}") from None
        finally:
            with suppress(OSError):
                part.unlink()
        return size


@contextmanager
def upload(source: Path | None, title: str) -> Iterator[dict[str, Any]]:
    """The arguments with which httpx sends a tar archive as a request's body, in pieces as they are read.

    Parameters
    ----------
    source
        The file; None is standard input, which is sent without a Content-Length.
    title
        Stands beside the progress bar.

    Raises
    ------
    Failure
        The file or standard input can't be read; the latter only while the request is sent.
    """
    try:
        stream = nullcontext(sys.stdin.buffer) if source is None else source.open("rb")
    except OSError as error:
        raise Failure(f"{source} can't be read: {error.strerror}") from None
    headers = {"Content-Type": "application/x-tar"}
    with stream as file:
        size = None if source is None else os.fstat(file.fileno()).st_size
        if size is not None:
            headers["Content-Length"] = str(size)
        with progress(title, size) as advance:
            yield {"headers": headers, "content": _pieces(file, source, advance)}


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Advance]:
    """A progress bar of `total` bytes (None: unknown) on standard error, or nothing if that is no terminal."""
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
        # The interpreter flushes its buffer when it ends, and would print a second error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Failure(f"standard output can't be written: {error.strerror}") from None


def _copy(response: httpx.Response, file: IO[bytes], advance: Advance) -> int:
    """Returns the number of bytes copied."""
    size = 0
    for chunk in response.iter_bytes(_CHUNK):
        file.write(chunk)
        size += len(chunk)
        advance(len(chunk))
    return size


def _pieces(file: IO[bytes], source: Path | None, advance: Advance) -> Iterator[bytes]:
    """A file's content in pieces. Raises Failure, which names `source`, if it can't be read."""
    try:
        while piece := file.read(_CHUNK):
            yield piece
            advance(len(piece))
    except OSError as error:
        raise Failure(f"{source or 'standard input'} can't be read: {error.strerror}") from None
