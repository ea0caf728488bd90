"""An S3 client: the objects below a prefix of a bucket on an S3-compatible server, with retries.

A request is repeated, with growing pauses, while its failure may be temporary: an error of the server's own, a broken
or silent connection, half a body. That is safe because every operation here is idempotent. What hardly gets better, as
damaged content, is tried a few times only. After the last attempt an OSError says in a few words what was wrong. It
never quotes the server or the client library, whose texts may hold addresses, keys and signatures.

For the library, a server is silent also while it is being sent to: its bound is on the time until an answer begins. So
requests that send much may be silent for longer.
"""

from __future__ import annotations

import copy
import errno
import http.client
import logging
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import count
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import parse_qsl, urlsplit
from urllib.request import Request, urlopen

import obstore
from obstore import exceptions
from obstore.store import S3Store

from era.errors import BadRequest

_PAGE = 1000
_HINT = "Write it as s3://BUCKET/PREFIX?endpoint=URL&region=NAME, with credentials in AWS_* variables."
_LATE = "it did not answer in time"
_PERMANENT = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError, exceptions.InvalidPathError)
_REFUSED = re.compile(r"status(?: code)?: (?:4(?!08|09|25|29)\d\d|501)|redirect without LOCATION")
"""In the text of an error, that a server takes a request for wrong: it isn't too slow, too early or one too many."""

_BRIEF_SECONDS = 5.0
"""`Patience.total` for those who need a bucket soon or not at all."""

_SMALL = 256 << 10
"""Content of up to this many bytes is sent within `Patience.silence` by any connection that is of use."""

_LARGE_SECONDS = 64.0
"""Seconds that larger content may take besides: 8 MiB by one of four connections, at half a MiB a second together."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How often and how long to retry."""

    total: float = 45.0
    """Seconds after which no further attempt begins."""

    attempts: int = 3
    """How often an operation is tried whose failure hardly gets better: content is damaged, a request is refused."""

    pause: float = 0.3
    """The pause after attempt n is between half of `pause * 2**n` seconds and all of it, at random."""

    longest_pause: float = 4.0
    """`pause * 2**n` counts as no more than this."""

    requests: int = 3
    """How often the client library repeats a single request within an attempt."""

    silence: float = 15.0
    """Seconds without a byte from the server that end a request."""


class BucketPrefix(NamedTuple):
    """A prefix of a bucket. `endpoint` None is AWS, `region` None is that of the environment."""

    bucket: str
    prefix: str
    endpoint: str | None
    region: str | None


class Listed(NamedTuple):
    """An object in a listing. Its name is relative to the prefix."""

    name: str
    modified: float
    """By the server's clock, in seconds since 1970."""

    size: int


class Damaged(Exception):
    """The content received isn't what was stored: reading it is worth another try."""


def parse(url: str) -> BucketPrefix:
    """The place that `url` names, as in `_HINT`. Raises BadRequest, which doesn't repeat the URL: people put keys into
    URLs."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    endpoint, region = options.pop("endpoint", None), options.pop("region", None)
    if parts.scheme != "s3" or not parts.netloc or parts.fragment:
        raise BadRequest("The blob store's URL is not one of an S3 bucket.", hint=_HINT)
    if "@" in parts.netloc or ":" in parts.netloc:
        raise BadRequest("The blob store's URL may name nothing but a bucket before its path.", hint=_HINT)
    if options:
        raise BadRequest(f"The blob store's URL has unknown options: {', '.join(sorted(options))}.", hint=_HINT)
    if endpoint is not None:
        server = urlsplit(endpoint)
        if server.scheme not in ("http", "https") or not server.hostname or "@" in server.netloc:
            raise BadRequest("The endpoint of the blob store must be a plain http or https URL.", hint=_HINT)
    return BucketPrefix(parts.netloc, parts.path.strip("/"), endpoint, region)


def servers_of(url: str) -> list[str]:
    """The name or address of the server that `url` names; none for no bucket, or one of AWS."""
    endpoint = parse(url).endpoint if url else None
    return [] if endpoint is None else [str(urlsplit(endpoint).hostname)]


class Bucket:
    """The objects below a prefix, by name. May be used from several threads. All methods raise OSError."""

    def __init__(self, url: str, patience: Patience) -> None:
        self._place = parse(url)
        self._patience = patience
        self._store = self._connected(patience.silence)
        self._store_large = self._connected(patience.silence + _LARGE_SECONDS)
        self._deleting = self._connected(patience.silence, retries=0)
        self._hurried = threading.Event()

    def _connected(self, silence: float, retries: int | None = None) -> S3Store:
        """What makes requests, each of which ends after so many seconds without a byte from the server, and is repeated
        so often without a word."""
        place, patience = self._place, self._patience
        options = {"endpoint": place.endpoint, "region": place.region}
        return S3Store(
            place.bucket,
            prefix=place.prefix or None,
            client_options={
                "allow_http": place.endpoint is not None and place.endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=min(5.0, patience.silence)),
                "read_timeout": timedelta(seconds=silence),
                # The library's own bound is on a whole request, so it would end every long download.
                "timeout": timedelta(days=1),
            },
            retry_config={
                "max_retries": patience.requests if retries is None else retries,
                # Not longer where more silence is borne: what has taken that long is up to `patiently`.
                "retry_timeout": timedelta(seconds=patience.silence),
                "backoff": {"init_backoff": timedelta(seconds=patience.pause / 3)},
            },
            **{name: value for name, value in options.items() if value is not None},  # type: ignore[arg-type]  # a dict
        )

    def briefly(self) -> Bucket:
        """The same bucket for those who give up after a few seconds: somebody waits for them, or they come again."""
        brief = copy.copy(self)
        brief._patience = replace(self._patience, total=min(self._patience.total, _BRIEF_SECONDS))
        return brief

    def hurry(self) -> None:
        """Begin no further attempt from now on: the service stops."""
        self._hurried.set()

    def put(self, name: str, content: bytes) -> None:
        """Store an object, which is durable when this returns. In one request: a multipart upload that a crash cuts
        short stays, unlisted, and is paid for; and not all servers get multipart right."""
        store = self._store if len(content) <= _SMALL else self._store_large
        self.patiently(lambda: obstore.put(store, name, content, use_multipart=False))

    def pieces(self, name: str) -> Iterator[bytes]:
        """The content of an object, which may break off. Call within `patiently`, and check the content."""
        for piece in obstore.get(self._store, name).stream(min_chunk_size=1 << 20):
            yield bytes(piece)

    def get(self, name: str) -> bytes:
        """The content of an object. Raises FileNotFoundError."""
        return self.patiently(lambda: bytes(obstore.get(self._store, name).bytes()))

    def has(self, name: str) -> bool:
        """Whether there is an object of this name."""
        try:
            self.patiently(lambda: obstore.head(self._store, name))
        except FileNotFoundError:
            return False
        return True

    def pages(self) -> Iterator[Sequence[Listed]]:
        """All objects, in lists of up to a thousand."""
        last = ""
        while page := self.page(last):
            yield page
            last = page[-1].name

    def page(self, after: str) -> Sequence[Listed]:
        """Up to a thousand objects whose names come after `after`."""
        return self.patiently(lambda: self._page(after))

    def _page(self, after: str) -> Sequence[Listed]:
        """Up to `_PAGE` objects whose names come after `after`."""
        page = next(iter(obstore.list(self._store, offset=after or None, chunk_size=_PAGE)), ())
        # Some servers begin with the offset itself.
        return [_listed(item) for item in page if item["path"] > after]

    def below(self, name: str) -> Sequence[Listed]:
        """The objects `NAME/…`, of which there are few."""
        return self.patiently(lambda: [_listed(item) for item in obstore.list(self._store, prefix=name).collect()])

    def delete(self, names: Sequence[str]) -> bool:
        """Delete up to a thousand objects. Names that don't exist are no error. Returns whether no request is under way
        any more: one that got no answer may still be carried out, though the next one has succeeded."""
        tries = 0

        def once() -> None:
            nonlocal tries
            tries += 1
            obstore.delete(self._deleting, names)

        if names:
            self.patiently(once)
        return tries < 2

    def signed_removals(self, names: Sequence[str], seconds: float) -> Sequence[Callable[[], bool]]:
        """Functions that delete these objects, one each, by requests that are signed now. The server refuses them once
        so many seconds are over, by its clock and ours: so a process that is paused meanwhile deletes nothing
        afterwards. They return whether no request is under way any more: one that got no answer may still be carried
        out, though the next one has succeeded."""
        urls = obstore.sign(self._store, "DELETE", names, timedelta(seconds=seconds)) if names else []
        return [partial(self._delete_signed, url) for url in urls]

    def _delete_signed(self, url: str) -> bool:
        tries = 0

        def once() -> None:
            nonlocal tries
            tries += 1
            _delete(url, self._patience.silence)

        self.patiently(once)
        return tries == 1

    def seconds_ahead(self, name: str) -> float:
        """By how many seconds the server's clock is ahead of ours, or a little less: it dates an object `NAME/…` that
        is put for that."""
        own = f"{name}/{secrets.token_hex(8)}"
        self.put(own, b"")
        now, modified = time.time(), {each.name: each.modified for each in self.below(name)}
        if own not in modified:
            raise _failure("the blob store lost what was just put")
        # Old ones are of processes that were killed.
        self.delete([each for each, at in modified.items() if each == own or at < modified[own] - 3600])
        return modified[own] - now

    def patiently[T](self, job: Callable[[], T]) -> T:
        """The result of `job`, which is repeated while its failure may be temporary.

        Raises FileNotFoundError where an object doesn't exist, OSError for any other failure: with EBADMSG where what
        came was damaged each time, else with EIO.
        """
        give_up = time.monotonic() + self._patience.total
        hopeless = 0
        for attempt in count(1):
            try:
                return job()
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket":
                    raise _failure("there is no such bucket") from None
                raise FileNotFoundError(errno.ENOENT, "it isn't in the blob store") from None
            except _PERMANENT as error:
                raise _failure(f"the blob store refused: {_reason(error)}") from None
            except (exceptions.BaseError, Damaged) as error:
                reason = _reason(error)
                hopeless += not _may_be_temporary(error)
                pause = self._pause_after(attempt)
                is_over = hopeless >= self._patience.attempts or time.monotonic() + pause > give_up
                if is_over or self._hurried.is_set():
                    number = errno.EBADMSG if isinstance(error, Damaged) else errno.EIO
                    raise OSError(number, f"the blob store failed: {reason}") from None
                _log.warning("the blob store failed, trying again: %s", reason)
            self._hurried.wait(pause)
        raise AssertionError("unreachable")

    def _pause_after(self, attempt: int) -> float:
        longest = min(self._patience.pause * 2.0 ** min(attempt, 30), self._patience.longest_pause)
        return longest * random.uniform(0.5, 1)  # noqa: S311  no secret


def _delete(url: str, seconds: float) -> None:
    """Make a request that was signed ahead. Raises BaseError."""
    try:
        with urlopen(Request(url, method="DELETE"), timeout=seconds):  # noqa: S310  the bucket's own scheme
            return
    except HTTPError as error:
        if error.code == 404:
            return
        if error.code == 403:
            raise exceptions.PermissionDeniedError("status: 403") from None
        raise exceptions.GenericError(f"status: {error.code}") from None
    except (OSError, http.client.HTTPException):  # its text may have the URL, and with it the signature
        raise exceptions.GenericError("error sending request") from None


def _listed(item: obstore.ObjectMeta) -> Listed:
    return Listed(item["path"], item["last_modified"].timestamp(), item["size"])


def _failure(reason: str) -> OSError:
    return OSError(errno.EIO, reason)


def _may_be_temporary(error: Exception) -> bool:
    if isinstance(error, Damaged):
        return False
    # S3 says 400 also where it has waited for the body in vain.
    return _REFUSED.search(str(error)) is None or _code(error) == "RequestTimeout"


def _code(error: Exception) -> str | None:
    """The error code of S3 in the text of an error, such as `NoSuchBucket`."""
    match = re.search(r"<Code>(\w{1,64})</Code>", str(error))
    return match[1] if match else None


def _reason(error: Exception) -> str:
    """Describe an error without quoting it."""
    if isinstance(error, Damaged):
        return str(error)
    text = str(error)
    if code := _code(error):
        return code
    if status := re.search(r"status: (\d{3})|status code: (\d{3})", text):
        return f"status {status[1] or status[2]}"
    for word, meaning in (
        ("TimedOut", _LATE),
        ("timed out", _LATE),
        ("ConnectError", "it could not be reached"),
        ("Connect", "it could not be reached"),
        ("error sending request", "the connection broke"),
        ("Body", "an answer broke off"),
    ):
        if word in text:
            return meaning
    return type(error).__name__
