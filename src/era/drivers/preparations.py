"""Preparing a service's languages in the background; see languages/preparation.py for what that is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

import structlog

from era.core.models import Language
from era.errors import Unavailable
from era.languages.preparation import READY, Preparation, PreparationFailed

log = structlog.get_logger()

_WAIT_SECONDS = 60.0


class Preparations:
    """The preparations of one service. They go on from `start` to `stop`; sandboxes wait for them (`wait`)."""

    def __init__(self, preparations: Mapping[Language, Preparation], fallback: Path) -> None:
        """`fallback` is a directory that can be written, for machines where no other can. Raises OSError."""
        self.mounts: dict[str, Path] = {}
        """The places of the results, by where sandboxes have them."""

        self._preparations = preparations
        self._tasks: dict[Language, asyncio.Task[None]] = {}
        self._is_started = False
        for preparation in preparations.values():
            self.mounts[preparation.mount] = preparation.ready_place() or preparation.make_place(fallback)

    def start(self) -> None:
        """Begin the preparations that don't wait until a language is asked for."""
        self._is_started = True
        for language, preparation in self._preparations.items():
            if preparation.at_start:
                self._begin(language)

    async def wait(self, language: Language) -> None:
        """Wait until a language is prepared, which begins here if it has to be asked for. Raises Unavailable after a
        minute. Returns also where its preparation has failed: its programs then start slowly."""
        if self._is_started:
            self._begin(language)
        if (task := self._tasks.get(language)) is None:
            return
        done, _ = await asyncio.wait([task], timeout=_WAIT_SECONDS)
        if task.cancelled():
            raise Unavailable("This server is about to stop.")
        if not done:
            title = self._preparations[language].title
            raise Unavailable(
                f"{title} is still being compiled on this server.", hint="That is done once. Try again in a minute."
            )

    async def stop(self) -> None:
        """End what goes on; the next service builds upon what there is of it. May be called again."""
        self._is_started = False
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _begin(self, language: Language) -> None:
        """Prepare a language in the background, unless that has been done or begun."""
        preparation = self._preparations.get(language)
        if preparation is None or language in self._tasks or (self.mounts[preparation.mount] / READY).is_dir():
            return
        self._tasks[language] = asyncio.create_task(self._prepare(language, preparation))

    async def _prepare(self, language: Language, preparation: Preparation) -> None:
        """Prepare a language, and tell the operator."""
        begun = time.monotonic()
        log.info(
            "language_being_prepared",
            language=language,
            what=f"{preparation.title} is being compiled in the background, about a minute, once for this machine",
            until_then="programs wait for it",
        )
        try:
            await preparation.run(self.mounts[preparation.mount], idle=True)
        except (PreparationFailed, OSError) as error:
            log.warning("language_not_prepared", language=language, error=str(error), effect="programs start slowly")
        else:
            log.info("language_prepared", language=language, seconds=round(time.monotonic() - begun))
