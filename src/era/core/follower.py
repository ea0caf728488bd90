"""What whoever follows a run has not heard of it yet."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from era.core.program import Output, Stream
from era.core.run_messages import News, RunStarted
from era.core.written import Written

_MOST_NEWS = 1000


@dataclass(slots=True, eq=False)
class _More:
    """So many bytes more of a stream."""

    stream: Stream
    size: int


class Follower:
    """Hands on a run's news to one listener, however late that is. Of output it knows only how much there is, so it
    takes no more memory the later the listener is."""

    def __init__(self) -> None:
        self._news: deque[RunStarted | _More] = deque()
        self._latest: dict[Stream, _More] = {}
        """By stream, the last of the news about it."""

        self._come = asyncio.Event()
        self._ended = False

    def put(self, news: News) -> None:
        if isinstance(news, RunStarted):
            self._news.append(news)
        else:
            latest = self._latest.get(news.stream)
            if latest is not None and self._news and (latest is self._news[-1] or len(self._news) > _MOST_NEWS):
                latest.size += news.size
            else:
                self._latest[news.stream] = more = _More(news.stream, news.size)
                self._news.append(more)
        self._come.set()

    def end(self) -> None:
        self._ended = True
        self._come.set()

    async def events(self) -> AsyncIterator[RunStarted | Output]:
        """All that comes until the end."""
        written: Mapping[Stream, Written] = {}
        at: dict[Stream, int] = {"stdout": 0, "stderr": 0}
        while True:
            while self._news:
                news = self._news.popleft()
                if isinstance(news, RunStarted):
                    written = news.written
                    yield news
                    continue
                if self._latest.get(news.stream) is news:
                    del self._latest[news.stream]
                start = at[news.stream]
                at[news.stream] = end = start + news.size
                async for piece in written[news.stream].pieces(start, end):
                    yield Output(news.stream, piece)
            if self._ended:
                return
            self._come.clear()
            await self._come.wait()
