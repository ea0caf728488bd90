"""Holds: objects `held/…` in a bucket, by which others than the collector of garbage keep content there.

A hold counts while it is young, so one that a killed process left counts for a quarter of an hour at most. It has the
digests that it keeps, a line for each; an empty one keeps all, and no collection goes on while there is one.
"""

from __future__ import annotations

import errno
import secrets
import threading
import time
from collections.abc import Iterable
from contextlib import suppress

from era.store.blobs.s3_client import Bucket

_HOLDS = "held"
_HOLD_SECONDS = 900.0
"""For how long a hold counts. Longer than clocks may differ, and than a bucket is away."""

_HOLD_AGAIN_SECONDS = 60.0


class Hold:
    """What keeps content from `everything` until `release`. Its methods may be called on several threads."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._name, self._content = f"{_HOLDS}/{secrets.token_hex(8)}", b""
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._keeper: threading.Thread | None = None

    def everything(self) -> None:
        """Keep all content from now on. Raises OSError."""
        self._begin(b"")

    def only(self, digests: Iterable[str]) -> None:
        """Keep only this content from now on. Raises OSError."""
        self._begin("\n".join(digests).encode() or b"\n")

    def release(self) -> None:
        """Keep nothing any more. May be called before the others have returned, or were called."""
        self._over.set()
        with self._lock:
            if self._keeper is not None:
                self._keeper.join()
                with suppress(OSError):  # it is soon too old to count
                    self._bucket.briefly().delete([self._name])

    def _begin(self, content: bytes) -> None:
        with self._lock:
            if self._over.is_set():
                return
            self._content = content
            if self._keeper is None:
                self._keeper = threading.Thread(target=self._keep, name="era-hold")
                self._keeper.start()
            self._bucket.put(self._name, content)

    def _keep(self) -> None:
        while not self._over.wait(_HOLD_AGAIN_SECONDS):
            with suppress(OSError):  # there is time for many more tries
                self._bucket.briefly().put(self._name, self._content)


def held(bucket: Bucket) -> set[str]:
    """The content that is held. What killed processes left is removed. Raises OSError, and BlockingIOError where all
    content is held."""
    since = time.time() - _HOLD_SECONDS
    holds = bucket.below(_HOLDS)
    if over := [name for name, modified, _ in holds if modified < since]:
        bucket.delete(over)
    digests: set[str] = set()
    for name, modified, size in holds:
        if modified < since:
            continue
        if not size:
            raise BlockingIOError(errno.EAGAIN, "a backup or a check is under way")
        with suppress(FileNotFoundError):  # it was released
            digests.update(bucket.get(name).decode(errors="replace").split())  # others may put anything there
    return digests
