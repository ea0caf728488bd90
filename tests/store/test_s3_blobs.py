"""Blobs in a bucket, beyond what test_blobs.py tests: URL, cache, other installations, servers that fail."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import obstore
import pytest
from obstore import exceptions

from era.errors import BadRequest, Conflict, NotReady, Unavailable
from era.store.blobs import s3_blobs as module
from era.store.blobs.blob_cache import BlobCache
from era.store.blobs.s3_blobs import S3Blobs, check_bucket, installation
from era.store.blobs.s3_client import Patience, _delete, parse
from tests.soaking import soak_the_rest
from tests.store.s3 import ACCESS_KEY, S3, SECRET_KEY, Fault, FaultyS3

HASTY = Patience(attempts=3, pause=0.02, requests=0, silence=20.0, total=60.0)
NERVOUS = Patience(attempts=3, pause=0.02, requests=0, silence=1.0, total=10.0)
RESTLESS = replace(NERVOUS, total=3.0)
ONCE = Patience(attempts=1, pause=0.02, requests=0, silence=20.0, total=0.0)
LONG = Patience(pause=0.02, requests=0, silence=1.0, total=90.0)

type Make = Callable[..., S3Blobs]

pytestmark = pytest.mark.slow  # starting the server takes seconds


@pytest.fixture
def make(s3: S3, bucket: str, tmp_path: Path) -> Iterator[Make]:
    """Makes stores in the test's bucket."""
    made: list[S3Blobs] = []

    def make(
        endpoint: str | None = None,
        *,
        cache_bytes: int = 16 << 20,
        owner: str = "tests",
        patience: Patience = HASTY,
    ) -> S3Blobs:
        cache = tmp_path / f"cache{len(made)}"
        url = s3.url(bucket, endpoint=endpoint)
        store = S3Blobs(url, cache, cache_bytes=cache_bytes, owner=owner, patience=patience)
        made.append(store)
        store.open()
        return store

    yield make
    for store in made:
        store.close()
        assert not list(Path(store._cache._directory).glob("incoming*")), "a half file was left behind"


def put(blobs: S3Blobs, *contents: bytes) -> list[str]:
    with blobs.batch() as batch:
        return [batch.put(content) for content in contents]


@pytest.mark.parametrize(
    "url",
    [
        "http://bucket/prefix",
        "s3:///prefix",
        "s3://key:canary@bucket/prefix",
        "s3://bucket:80/prefix",
        "s3://bucket/prefix#canary",
        "s3://bucket/prefix?secret_key=canary",
        "s3://bucket/prefix?endpoint=ftp://canary",
        "s3://bucket/prefix?endpoint=http://key:canary@host",
        "s3://bucket/prefix?endpoint=http://",
        "canary",
    ],
)
def test_a_bad_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(url)
    assert "canary" not in caught.value.message
    assert "s3://BUCKET" in caught.value.hint


def test_the_parts_of_a_url() -> None:
    assert parse("s3://b") == ("b", "", None, None)
    assert parse("s3://b/p/q/?region=r") == ("b", "p/q", None, "r")
    assert parse("s3://b/p?endpoint=https://h:1/x&region=r") == ("b", "p", "https://h:1/x", "r")


def test_a_prefix_belongs_to_one_installation(make: Make) -> None:
    make()
    make()
    with pytest.raises(Conflict, match="another installation"):
        make(owner="other")


def test_an_installation_keeps_its_id(tmp_path: Path) -> None:
    ids = {installation(tmp_path / "store-id") for _ in range(3)}
    assert len(ids) == 1
    assert ids != {installation(tmp_path / "other-id")}
    assert all(len(each) == 32 for each in ids)


def test_parts_alone_are_no_content(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("era.store.blobs.s3_blobs.PART", 1 << 16)
    large = bytes(range(256)) * 1000
    store = make()
    with store.batch() as batch, (tmp_path / "large").open("w+b", buffering=0) as file:
        file.write(large)
        file.seek(0)
        digest = batch.put_file(file.fileno(), len(large))
    assert store.sizes()[digest] > len(large)
    store.take_out(digest, tmp_path / "aside")
    assert digest not in store.sizes()
    with pytest.raises(FileNotFoundError):
        store.take_out(digest, tmp_path / "aside")


def test_a_server_that_cannot_be_used_is_an_error_at_open(
    s3: S3, bucket: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(Unavailable, match="could not be reached"):
            make(f"http://127.0.0.1:{unused.getsockname()[1]}")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begun = time.monotonic()
        with pytest.raises(Unavailable, match="did not answer in time"):
            make(f"http://127.0.0.1:{silent.getsockname()[1]}", patience=RESTLESS)
        assert time.monotonic() - begun < 60
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-canary")
    with pytest.raises(Unavailable, match="SignatureDoesNotMatch"):
        make()


def test_a_missing_bucket_is_an_error_at_open(s3: S3, tmp_path: Path) -> None:
    blobs = S3Blobs(s3.url("nothing-here"), tmp_path, cache_bytes=1 << 20, owner="tests", patience=HASTY)
    with pytest.raises(Unavailable, match="no such bucket"):
        blobs.open()
    blobs.close()


def test_credentials_are_in_no_error_and_no_log(
    make: Make, faulty: FaultyS3, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    texts = []
    for environment in ({"AWS_SECRET_ACCESS_KEY": "wrong-canary"}, {"AWS_ACCESS_KEY_ID": "wrong-canary"}, {}):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            faulty.fail("error" if not environment else None, 1)
            with pytest.raises(Unavailable) as caught:
                make(faulty.endpoint, patience=ONCE)
            cause: BaseException | None = caught.value
            while cause is not None:
                texts.append(repr(cause) + str(cause))
                cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    store = make()
    texts += [caplog.text, repr(store), repr(store._bucket), repr(vars(store._bucket))]
    for text in texts:
        for secret in (ACCESS_KEY, SECRET_KEY, "canary", "Signature="):
            assert secret not in text


@pytest.mark.parametrize("fault", soak_the_rest(["error", "error after", "half", "hang"], ["error after"]))
def test_one_failed_request_does_no_harm(
    fault: Fault, make: Make, faulty: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every single request may fail once: what is put is there, what is read is right, what is swept is gone."""
    monkeypatch.setattr(module, "PART", 100_000)
    store = make(faulty.endpoint, patience=NERVOUS if fault == "hang" else HASTY)
    path = tmp_path / "large"
    large = bytearray(os.urandom(2 * module.PART + 100))

    def everything(n: int) -> None:
        large[0] = n
        path.write_bytes(large)
        horizon = time.time()
        with open(path, "rb") as file, store.batch() as batch:
            digest = batch.put(b"small" + bytes([n]))
            big = batch.put_file(file.fileno(), len(large))
        store._cache.clear()
        assert store.get(digest) == b"small" + bytes([n])
        assert store.get(big) == large
        store.sweep({digest, big}, horizon)

    n = 1
    while True:
        faulty.fail(fault, n)
        everything(n)
        if not faulty.failed:
            break
        n += 1
    assert n > 10, "five to put, five to get, some to sweep"
    with make().batch():
        pass
    assert len([name for name in s3_names(store) if name != "owner"]) == 5


def s3_names(store: S3Blobs) -> list[str]:
    return [listed.name for page in store._bucket.pages() for listed in page]


def test_half_a_body_is_never_used(s3: S3, bucket: str, make: Make) -> None:
    """Not even if the server itself has it wrong."""
    content = os.urandom(100_000)
    digest = put(make(), content)[0]
    reader = make()
    for wrong in (content[:50_000], content + b"x", b"", b"\0" * 100_000):
        obstore.put(s3.bucket(bucket, "some/prefix"), digest, wrong)
        for read in (reader.get, reader.open_blob):
            with pytest.raises(OSError, match="damaged"):
                read(digest)
    obstore.put(s3.bucket(bucket, "some/prefix"), digest, content)
    assert reader.get(digest) == content


def test_a_failed_batch_says_so_and_can_be_repeated(make: Make, faulty: FaultyS3) -> None:
    store = make(faulty.endpoint, patience=ONCE)
    contents = [os.urandom(100) for _ in range(100)]
    faulty.fail("error", 30)
    with pytest.raises(OSError, match="status 500"):
        put(store, *contents)
    faulty.fail(None)
    digests = put(store, *contents)
    reader = make()
    assert [reader.get(digest) for digest in digests] == contents


def test_the_cache_keeps_what_was_used_last(make: Make, faulty: FaultyS3) -> None:
    writer, reader = make(), make(faulty.endpoint, cache_bytes=4000)
    contents = [os.urandom(900) for _ in range(6)]
    digests = put(writer, *contents)

    def requests(digest: str, content: bytes) -> int:
        faulty.fail(None)
        assert reader.get(digest) == content
        return faulty.requests

    assert [requests(*pair) for pair in zip(digests[:4], contents[:4], strict=True)] == [1] * 4
    assert [requests(*pair) for pair in zip(digests[:4], contents[:4], strict=True)] == [0] * 4
    assert requests(digests[0], contents[0]) == 0
    held = reader.open_blob(digests[1])
    assert [requests(*pair) for pair in zip(digests[4:], contents[4:], strict=True)] == [1] * 2
    assert requests(digests[0], contents[0]) == 0
    assert requests(digests[2], contents[2]) == 1
    assert os.read(held, 1000) == contents[1], "who has it open can still read it"
    os.close(held)
    files = list(Path(reader._cache._directory).iterdir())
    assert len(files) == 4
    assert sum(file.stat().st_size for file in files) == 3600


def test_a_blob_too_large_for_the_cache_can_be_read(make: Make) -> None:
    content = os.urandom(100_000)
    store = make(cache_bytes=50_000)
    digest = put(store, content)[0]
    for _ in range(2):
        assert store.get(digest) == content
    assert list(Path(store._cache._directory).iterdir()) == []


def test_a_new_process_starts_with_an_empty_cache(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ("0" * 64)).write_bytes(b"left by a process that a power cut ended")
    cache = BlobCache(tmp_path / "cache", 1000)
    cache.open()
    assert cache.find("0" * 64) is None
    assert list((tmp_path / "cache").iterdir()) == []


def test_expected_blobs_are_fetched_together(make: Make, faulty: FaultyS3) -> None:
    digests = put(make(), *(os.urandom(100) for _ in range(64)))
    faulty.fail(None)
    reader = make(faulty.endpoint)
    reader.expect(digests)
    before = faulty.requests
    for digest in digests:
        os.close(reader.open_blob(digest))
    assert faulty.requests == before


def test_a_sweep_goes_through_many_pages(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("era.store.blobs.s3_client._PAGE", 7)
    store = make()
    digests = put(store, *(os.urandom(10) for _ in range(50)))
    assert store.sweep(set(digests[:10]), time.time() + 1) == 40
    assert [store.get(digest) for digest in digests[:10]]


def test_a_sweep_removes_all_parts_though_they_are_listed_on_several_pages(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("era.store.blobs.s3_client._PAGE", 3)
    monkeypatch.setattr(module, "PART", 1000)
    store = make()
    (tmp_path / "large").write_bytes(os.urandom(15_500))
    with open(tmp_path / "large", "rb") as file, store.batch() as batch:
        digest = batch.put_file(file.fileno(), 15_500)
    assert len(s3_names(store)) == 18
    assert store.sweep({digest}, time.time() + 1) == 0
    assert store.get(digest) == (tmp_path / "large").read_bytes()
    assert store.sweep(set(), time.time() + 1) == 1
    assert s3_names(store) == ["owner"]


def test_a_full_cache_fails_no_commit(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make()
    with monkeypatch.context() as patch:
        patch.setattr(store._cache, "_directory", "/dev/full")
        digest = put(store, b"content")[0]
    assert store.get(digest) == b"content"


def test_content_is_uploaded_again_after_half_an_hour(make: Make, faulty: FaultyS3) -> None:
    """So that another process's sweep, which knows times only, spares it."""
    store = make(faulty.endpoint)
    digest = put(store, b"content")[0]
    faulty.fail(None)
    put(store, b"content")
    assert faulty.requests == 0
    store._uploaded[digest] = store._uploaded[digest]._replace(at=time.time() - 1801)
    put(store, b"content")
    assert faulty.requests == 1


def test_a_file_that_was_put_just_before_is_not_read_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have gigabytes, and an upload is put before its session's turn and again within that."""
    store, path = make(), tmp_path / "spooled"
    path.write_bytes(b"content")
    digest = hashlib.sha256(b"content").hexdigest()
    read: list[int] = []
    put_file = module.S3Batch.put_file

    def noted(batch: module.S3Batch, fd: int, size: int) -> str:
        read.append(size)
        return put_file(batch, fd, size)

    monkeypatch.setattr(module.S3Batch, "put_file", noted)
    for _ in range(2):
        with store.batch() as batch:
            batch.put_spooled(str(path), digest)
    assert read == [7]
    monkeypatch.setattr(module, "_FRESH_SECONDS", 0)
    with store.batch() as batch:
        batch.put_spooled(str(path), digest)
    assert read == [7, 7], "once it is so old that it may be swept"
    assert store.get(digest) == b"content"


def test_a_put_waits_for_a_removal_of_its_content(
    make: Make, faulty: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the server was busy and the removal was asked for twice, the put waits for so long after it.
    monkeypatch.setattr(module, "_DOUBT_SECONDS", 1.0)
    store = make(faulty.endpoint)
    digest = put(store, b"content")[0]
    time.sleep(0.01)
    removing, go_on = threading.Event(), threading.Event()
    delete = store._bucket.delete

    def slow(names: list[str]) -> bool:
        removing.set()
        assert go_on.wait(60)
        return delete(names)

    store._bucket.delete = slow  # type: ignore[method-assign, assignment]
    sweep = threading.Thread(target=lambda: store.sweep(set(), time.time()))
    sweep.start()
    assert removing.wait(60)
    again = threading.Thread(target=lambda: put(store, b"content"))
    again.start()
    time.sleep(0.1)
    assert again.is_alive()
    go_on.set()
    again.join()
    sweep.join()
    assert make().get(digest) == b"content"


@pytest.mark.parametrize("is_repeated", [False, True])
def test_a_removal_that_may_still_come_is_waited_for(
    make: Make, faulty: FaultyS3, is_repeated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was made again and that got an answer."""
    monkeypatch.setattr(module, "_DOUBT_SECONDS", 0.5)
    store = make(faulty.endpoint, patience=Patience(pause=0.001) if is_repeated else ONCE)
    digest = put(store, b"content")[0]
    time.sleep(0.01)
    horizon = time.time()
    faulty.fail("error after", 3)  # Holds are looked for first, and what there is.
    with nullcontext() if is_repeated else pytest.raises(OSError, match="status 500"):
        store.sweep(set(), horizon)
    assert faulty.failed
    begun = time.monotonic()
    put(store, b"content")
    assert time.monotonic() - begun > 0.4
    assert make().get(digest) == b"content"


@pytest.fixture
def failing(faulty: FaultyS3) -> Iterator[FaultyS3]:
    """Fails all requests from when a test says so until it ends."""
    yield faulty
    faulty.fail_all(False)


def seconds(job: Callable[[], object], match: str | None = None) -> float:
    """How long `job` takes; with `match`, until it fails with such an error."""
    begun = time.monotonic()
    if match is None:
        job()
    else:
        with pytest.raises((OSError, Unavailable, NotReady), match=match):
            job()
    return time.monotonic() - begun


def test_a_server_that_fails_for_some_seconds_does_no_harm(make: Make, failing: FaultyS3) -> None:
    """As one does that asks for fewer requests."""
    store = make(failing.endpoint, patience=Patience())
    failing.fail_all(True)
    recovery = threading.Timer(4, failing.fail_all, (False,))
    recovery.start()
    digest = put(store, b"content")[0]
    recovery.join()
    assert make().get(digest) == b"content"


def test_what_hardly_gets_better_is_tried_a_few_times(s3: S3, bucket: str, make: Make, faulty: FaultyS3) -> None:
    """However long a server that fails otherwise is waited for."""
    patient = Patience(attempts=4, pause=0.02, requests=0, total=300.0)
    store = make(faulty.endpoint, patience=patient)
    digest = put(make(), b"content")[0]
    obstore.put(s3.bucket(bucket, "some/prefix"), digest, b"damaged")
    faulty.fail(None)
    assert seconds(lambda: store.get(digest), "damaged") < 60
    assert faulty.requests == 4
    faulty.fail(None)
    # Radosgw refuses longer names with 400.
    assert seconds(lambda: store._bucket.put("x" * 1100, b""), "blob store") < 60
    assert faulty.requests <= 4


def test_a_server_that_fails_on_is_an_error_in_time(make: Make, failing: FaultyS3) -> None:
    store = make(failing.endpoint, patience=Patience(total=3.0))
    failing.fail_all(True)
    assert 1.5 < seconds(lambda: put(store, b"content"), "status 500") < 30


def test_a_batch_waits_once_for_a_server_that_fails(
    make: Make, failing: FaultyS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """However many uploads it would have been."""
    monkeypatch.setattr(module, "PART", 1000)
    patience = Patience(pause=0.02, longest_pause=0.5, requests=0, total=8.0)
    stores = [make(failing.endpoint, patience=patience) for _ in range(2)]
    (tmp_path / "large").write_bytes(os.urandom(20_000))

    def many() -> None:
        put(stores[0], *(os.urandom(10) for _ in range(100)))

    def large() -> None:
        with open(tmp_path / "large", "rb") as file, stores[1].batch() as batch:
            batch.put_file(file.fileno(), 20_000)

    failing.fail_all(True)
    with ThreadPoolExecutor() as threads:
        assert max(threads.map(lambda job: seconds(job, "status 500"), (many, large))) < 14


def test_who_can_not_wait_gives_up_soon(
    s3: S3, bucket: str, make: Make, failing: FaultyS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those who start, and what others wait for or what comes again."""
    monkeypatch.setattr("era.store.blobs.s3_client._BRIEF_SECONDS", 0.5)
    monkeypatch.setattr(module, "_PATIENCE", LONG)
    store = make(failing.endpoint, patience=LONG)
    digest = put(store, b"content")[0]
    hold = store.hold()
    hold.everything()
    store._recent.clear()  # what was put lately isn't removed
    remove = store._bucket.briefly().signed_removals([digest], 60)[0]
    failing.fail_all(True)
    with ThreadPoolExecutor() as threads:
        jobs: list[tuple[Callable[[], object], str | None]] = [
            (store.open, "status 500"),
            (lambda: check_bucket(s3.url(bucket, endpoint=failing.endpoint), tmp_path / "id"), "status 500"),
            (lambda: store._remove({digest: [digest]}), "status 500"),
            (remove, "status 500"),
            (hold.release, None),
        ]
        assert max(threads.map(lambda job: seconds(*job), jobs)) < 60


def test_closing_waits_for_no_server_that_fails(make: Make, failing: FaultyS3) -> None:
    store = make(failing.endpoint, patience=LONG)
    failing.fail_all(True)
    with ThreadPoolExecutor() as threads:
        uploading = threads.submit(put, store, b"content")
        reading = threads.submit(store.get, "0" * 64)
        time.sleep(1)
        assert not uploading.done()
        assert not reading.done()
        assert seconds(store.close) < 30
        for job in (uploading, reading):
            with pytest.raises(OSError, match="status 500"):
                job.result(30)


@pytest.mark.parametrize("size", soak_the_rest([600_000, 3 << 20], 1))
def test_an_upload_may_take_longer_than_a_server_is_silent(make: Make, faulty: FaultyS3, size: int) -> None:
    store = make(faulty.endpoint, patience=NERVOUS)
    faulty.bytes_per_second = size // 2
    contents = [os.urandom(size) for _ in range(2)]
    digests = put(store, *contents)
    faulty.fail(None)
    digests += put(store, b"x" * size)
    assert faulty.requests == 1, "no attempt is begun in vain"
    assert [make().get(digest) for digest in digests] == [*contents, b"x" * size]


def test_a_server_that_is_silent_about_large_content_is_an_error_in_time(
    make: Make, faulty: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one attempt, which has the time that such an upload may need."""
    monkeypatch.setattr("era.store.blobs.s3_client._LARGE_SECONDS", 8.0)
    store = make(faulty.endpoint, patience=RESTLESS)
    faulty.answering.clear()
    try:
        assert 5 < seconds(lambda: put(store, bytes(1 << 20)), "did not answer in time") < 30
    finally:
        faulty.answering.set()


def test_an_answer_that_is_no_http_is_an_error_of_the_bucket() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as threads:

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.recv(10_000)
                connection.sendall(b"nonsense\r\n\r\n")

        answering = threads.submit(answer)
        with pytest.raises(exceptions.GenericError, match="error sending request"):
            _delete("http://{}:{}/x".format(*server.getsockname()), 5)
        answering.result()


def test_what_others_have_put_among_the_holds_keeps_no_collection_off(s3: S3, bucket: str, make: Make) -> None:
    store = make()
    obstore.put(s3.bucket(bucket, "some/prefix"), "held/foreign", b"\xff\xfe")
    assert store.sweep(set(), time.time()) == 0


def cached_and_open(store: S3Blobs) -> list[str]:
    """The files of a store's cache of which this process has descriptors."""
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if os.path.realpath(link).startswith(store._cache._directory)]


def test_no_descriptor_is_left_of_content_that_is_too_large_to_be_put_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make()
    digest = put(store, bytes(2000))[0]
    monkeypatch.setattr(module, "PART", 1000)
    with pytest.raises(OSError, match="try again"):
        store._put_again(digest)
    assert cached_and_open(store) == []


def test_content_is_read_without_a_cache_that_can_keep_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = put(make(), b"content")[0]
    store = make()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store._cache, "keep", full)
    assert store.get(digest) == b"content"
    assert cached_and_open(store) == []
