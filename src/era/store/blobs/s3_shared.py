"""What hosts of a cluster do so that one of them can remove content from the bucket that they share (condemned.py)."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from itertools import batched

from era.store.blobs.condemned import LONG_AGO_US, RELY_US, Condemned, GarbageCollection
from era.store.blobs.s3_client import Bucket, Listed

_AT_ONCE = 200
"""Content that is removed at a time, while which nobody can put the same."""

_SIGNED_SECONDS = 60.0
"""For how long a request to delete something is good."""

_APART_SECONDS = 120.0
"""By how much the bucket's clock and ours may differ. A request is good for that much longer."""

_LONGEST_SECONDS = 4 * 3600.0
"""What is needed was read this long ago at most, or is a grace period longer ago. Less than `_KEPT_US`."""

_REMOVAL_SECONDS = _SIGNED_SECONDS + _APART_SECONDS + 60.0
_PATIENCE_SECONDS = 30.0
"""For how long a put waits for the removal of the same content to end. That takes seconds, unless its host died."""

_PAUSE_SECONDS = 0.2

type DigestOf = Callable[[str], str | None]


def confirm(condemned: Condemned, put_at: dict[str, int], put_again: Callable[[str], None]) -> None:
    """See to it that content is there to be named by a row. `put_at` says for each digest a time, by the database's
    clock, before its put; it is put again where it may have been removed since. Raises OSError where that can't be
    done."""
    give_up = time.monotonic() + _PATIENCE_SECONDS
    while True:
        found, now = condemned.find(put_at)
        long_ago = [digest for digest, at in put_at.items() if at < now - LONG_AGO_US]
        if found or long_ago:
            found, now = condemned.spare(found, long_ago)
        lost = [digest for digest, at in put_at.items() if found.get(digest, 0) >= at or at < now - RELY_US]
        if not lost:
            return
        if all(found.get(digest, 0) < now for digest in lost):
            for digest in lost:
                put_again(digest)
                put_at[digest] = now
        elif time.monotonic() > give_up:
            raise OSError(errno.EAGAIN, "the same content is being removed; try again in some minutes")
        else:
            time.sleep(_PAUSE_SECONDS)


class Collection:
    """A collection of garbage in a bucket. Its methods raise OSError."""

    def __init__(self, bucket: Bucket, condemned: Condemned, threads: Executor, digest_of: DigestOf) -> None:
        self._bucket = bucket
        self._condemned = condemned
        self._threads = threads
        self._digest_of = digest_of
        """The digest of the content that an object of this name belongs to."""

    def run(self, keep: set[str], older_than: float, go_on: Callable[[], None]) -> int:
        """Remove content that isn't in `keep` and was last put before `older_than`, by our clock; how many blobs.
        `go_on` is called now and then, and may raise."""
        collection = self._condemned.begin_collection()
        if time.time() - older_than > _LONGEST_SECONDS:  # and not before: it may have been paused in between
            raise OSError(errno.ETIME, "it took too long to find what is needed")
        older_than += self._seconds_ahead()
        removed, after = 0, ""
        while page := self._bucket.page(after):
            go_on()
            if old := self._old(page, keep, older_than):
                condemned = self._condemned.condemn(collection, sorted(old))
                # What was put meanwhile is young now; whoever puts it from here on sees that it is condemned.
                still = self._old(self._bucket.page(after), keep, older_than)
                for some in batched([digest for digest in condemned if digest in still], _AT_ONCE):
                    removed += self._remove(collection, {digest: still[digest] for digest in some})
            after = page[-1].name
        return removed

    def _old(self, page: Iterable[Listed], keep: set[str], older_than: float) -> Mapping[str, Sequence[str]]:
        """The names of the objects on a page that are old and belong to content that needn't be kept, by digest. What
        begins on a page before was removed with that."""
        old: dict[str, list[str]] = {}
        for name, modified, _ in page:
            digest = self._digest_of(name)
            if digest is not None and digest not in keep and modified < older_than:
                old.setdefault(digest, []).append(name)
        return old

    def _remove(self, collection: GarbageCollection, names: Mapping[str, Sequence[str]]) -> int:
        """Delete the objects of content that is still condemned; how many blobs."""
        seconds = _SIGNED_SECONDS + max(self._seconds_ahead(), 0.0)  # our clock may have been set since this began
        brief = self._bucket.briefly()  # nobody can put the same while it is removed
        removals = {
            digest: brief.signed_removals(objects, seconds) for digest, objects in names.items()
        }  # before the time begins in which they may be used
        condemned, until = self._condemned.begin_removal(collection, list(names), _REMOVAL_SECONDS)
        # What a lost request may still delete counts as being removed until none is good any more.
        doubtful: set[str] = set()
        for parts in (False, True):  # where the blob's own object is, its parts are
            sent = [
                (digest, remove)
                for digest in condemned
                for name, remove in zip(names[digest], removals[digest], strict=True)
                if (name != digest) == parts
            ]
            over = self._threads.map(lambda each: each[1](), sent)
            doubtful.update(digest for (digest, _), is_over in zip(sent, over, strict=True) if not is_over)
        self._condemned.end_removal([digest for digest in condemned if digest not in doubtful], until)
        return sum(digest in names[digest] for digest in condemned)

    def _seconds_ahead(self) -> float:
        """By how much the bucket's clock is ahead of ours. Raises OSError where they are too far apart."""
        ahead = self._bucket.seconds_ahead("clock")
        if abs(ahead) > _APART_SECONDS:
            raise OSError(errno.ETIME, f"the clocks of this host and the bucket are {abs(ahead):.0f} seconds apart")
        return ahead
