"""Readiness: whether the service can take runs now, and if not, why.

Anybody may ask, without a key, so what asking costs is bounded: the store and the disk are tried at most once a second,
and everybody who asks meanwhile gets the same result. That there is isolation isn't asked: a service that has none
doesn't start.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from era.errors import EraError, Unready

_VALID_SECONDS = 1.0
_ANSWER_SECONDS = 5.0
"""A store or disk that takes longer than this to write a little counts as one that can't."""

_PROBE = bytes(4096)


class Readiness:
    """Whether runs can be taken. `stop` once the service is told to end."""

    def __init__(self, directory: Path, write_to_store: Callable[[], Awaitable[None]]) -> None:
        """`directory` must take files. `write_to_store` raises EraError where the database can't be written to."""
        self._directory = directory
        self._write_to_store = write_to_store
        self._stopping = False
        self._trial: asyncio.Task[str | None] | None = None
        self._tried_at = 0.0
        self._can_not: str | None = None
        """Why the last trial found that runs can't be taken, if it did."""

    def stop(self) -> None:
        """From now on the service isn't ready."""
        self._stopping = True

    async def check(self) -> None:
        """Raises Unready, with the reason, where the service can't take runs."""
        if self._stopping:
            raise Unready("The service is stopping.", details={"reason": "stopping"})
        if why := await asyncio.shield(self._tried()):
            raise Unready(why, details={"reason": "storage"})

    def is_likely(self) -> bool:
        """Whether runs can be taken, by the last trial that ended, at once; the next one begins if it is time for it.
        Hosts of a cluster are asked about their room by others, who don't wait for a disk."""
        if not self._stopping:
            self._tried()
        return not self._stopping and self._can_not is None

    def _tried(self) -> asyncio.Task[str | None]:
        """The trial under way, or one that ended just now, or a new one."""
        trial = self._trial
        if trial is None or (trial.done() and time.monotonic() - self._tried_at > _VALID_SECONDS):
            trial = self._trial = asyncio.create_task(self._try())
        return trial

    async def _try(self) -> str | None:
        """Write a little to disk and to the database; why that can't be done, None where it can."""
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await asyncio.to_thread(self._write_file)
                await self._write_to_store()
        except TimeoutError:
            self._can_not = "The data directory takes too long to be written to."
        except OSError as error:
            self._can_not = f"The data directory can't be written to: {error.strerror}."
        except EraError as error:
            self._can_not = f"The database can't be written to: {error.message}."
        else:
            self._can_not = None
        finally:
            self._tried_at = time.monotonic()
        return self._can_not

    def _write_file(self) -> None:
        """Raises OSError where no file can be made and made durable."""
        with tempfile.TemporaryFile(dir=self._directory) as file:
            file.write(_PROBE)
            file.flush()
            os.fsync(file.fileno())
