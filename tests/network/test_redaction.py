"""Values in answers become placeholders again, and answers stay what they are."""

from __future__ import annotations

import asyncio
import base64
import gzip
import html
import json
import random
import re
import string
import time
import zlib
from collections.abc import Callable, Iterable
from itertools import pairwise
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from era.core.allowlist import allowlist
from era.core.concurrency import frames
from era.core.secrets import Secret
from era.network import exchange, interception
from era.network.http1 import MAX_HEAD
from era.network.redaction import Inflate, RedactedStream, Redaction, Tripwire
from tests.network.lab import HOST, VALUE, Answer, Lab, request
from tests.soaking import soak_the_rest

HOSTS = allowlist([HOST])
KEY = "canary-8161943"


def secret(value: str) -> Secret:
    return Secret("TOKEN", value, HOSTS)


GO_TEMPLATE = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&#34;", "'": "&#39;", "+": "&#43;"}
HANDLEBARS = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;", "`": "&#x60;", "=": "&#x3D;"}
MUSTACHE = {**HANDLEBARS, "'": "&#39;", "/": "&#x2F;"}


def table(value: str, escapes: dict[str, str]) -> str:
    return "".join(escapes.get(char, char) for char in value)


WRITTEN: dict[str, Callable[[str], str]] = {
    "plain": str,
    "json": json.dumps,
    "json with other letters": lambda value: json.dumps(value, ensure_ascii=False),
    "json for scripts": lambda value: (
        json.dumps(value).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    ),
    "json as PHP has it": lambda value: json.dumps(value).replace("/", "\\/"),
    "url": quote,
    "url path": lambda value: quote(value, safe=""),
    "url form": quote_plus,
    "url in small letters": lambda value: re.sub("%..", lambda found: found[0].lower(), quote(value, safe="")),
    "html": html.escape,
    "html as Go has it": lambda value: html.escape(value).replace("&quot;", "&#34;").replace("&#x27;", "&#39;"),
    "html as Go's templates have it": lambda value: table(value, GO_TEMPLATE),
    "html as Mustache has it": lambda value: table(value, MUSTACHE),
    "html as Handlebars has it": lambda value: table(value, HANDLEBARS),
    "html as PHP has it": lambda value: html.escape(value).replace("&#x27;", "&#039;"),
    "xml": lambda value: html.escape(value).replace("&#x27;", "&apos;"),
    "url as forms have it": lambda value: quote_plus(value, safe="*-._").replace("~", "%7E"),
    "json as .NET has it": lambda value: "".join(
        f"\\u{ord(char):04X}" if char in "<>&'+\"`" or ord(char) > 126 else json.dumps(char)[1:-1] for char in value
    ),
    "json as Gson has it": lambda value: re.sub(
        "[<>&'=]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False)[1:-1]
    ),
    "read as Latin-1": lambda value: value.encode().decode("latin-1"),
    "read as Latin-1, in JSON": lambda value: json.dumps(value.encode().decode("latin-1"))[1:-1],
    "base64": lambda value: base64.b64encode(value.encode()).decode(),
    "basic": lambda value: base64.b64encode(f"me:{value}".encode()).decode(),
    "basic of another": lambda value: base64.urlsafe_b64encode(f"mina:{value}, and more".encode()).decode(),
}


@pytest.mark.parametrize("value", [KEY, VALUE, "a/b<c>&'d'", "ab cd é/+", "ab~c*d q+w==", "t*r&3\"x'y`z=\\/"])
@pytest.mark.parametrize("how", WRITTEN)
def test_it_is_found_as_others_write_it(value: str, how: str) -> None:
    one = secret(value)
    written = WRITTEN[how](value).encode()
    found = Redaction([one]).whole(b"<" + written + b">")
    assert one.placeholder.encode() in found
    if "base" not in how and "basic" not in how and "json" not in how:
        assert found == b"<" + one.placeholder.encode() + b">"


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_it_is_found_in_wide_encodings(codec: str) -> None:
    one = secret("ab cd é/+")
    found = Redaction([one]).whole(f"<{one.value}>".encode(codec))
    assert found.decode(codec) == f"<{one.placeholder}>"


@pytest.mark.parametrize("rounds", soak_the_rest([150, 800], 1))
def test_pieces_may_end_anywhere(rounds: int) -> None:
    """And nothing else changes, whatever values have in common."""
    chance = random.Random(3)
    for _ in range(rounds):
        values = {"".join(chance.choices("xy", k=chance.randint(6, 9))) for _ in range(3)}
        secrets = [secret(value) for value in sorted(values)]
        one = Redaction(secrets)
        data = "".join(chance.choices("xy\n", weights=[9, 9, 1], k=chance.randint(0, 80))).encode()
        whole, stream, parts, at = one.whole(data), one.stream(), [], 0
        while at < len(data):
            size = chance.randint(1, 12)
            parts.append(stream.feed(data[at : at + size]))
            at += size
            assert len(stream._held) <= one.reach
        assert b"".join([*parts, stream.feed(b"", last=True)]) == whole
        restored = whole
        for each in secrets:
            assert each.value.encode() not in whole
            restored = restored.replace(each.placeholder.encode(), each.value.encode())
        assert restored == data


def test_a_line_is_not_held_back() -> None:
    stream = Redaction([secret(KEY)]).stream()
    assert stream.feed(b"data: can\n\n") == b"data: can\n\n"
    assert stream.feed(b"data: canary-81") == b""
    assert stream.feed(b"2\nda") == b"data: canary-812\n"
    assert stream.feed(b"", last=True) == b"da"


@pytest.mark.parametrize("is_sound", [True, False])
def test_a_line_break_may_be_within_a_value(is_sound: bool) -> None:
    """In UTF-16 some letters have that byte."""
    one = secret("a\u010ab\u0a0ac\u0a85d")
    redaction = Redaction([one])
    redaction._in_lines = redaction._in_lines or not is_sound
    for codec in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        written, found = f"<{one.value}>".encode(codec), 0
        for at in range(len(written)):
            stream = redaction.stream()
            passed = stream.feed(written[:at]) + stream.feed(written[at:]) + stream.feed(b"", last=True)
            found += passed.decode(codec) == f"<{one.placeholder}>"
        assert (found == len(written)) == is_sound


def frames_of(payloads: list[bytes]) -> bytes:
    return b"".join(frames.made(frames.BINARY, payload) for payload in payloads)


@pytest.mark.parametrize("rounds", soak_the_rest([400, 2000], 1))
def test_a_tripwire_passes_on_all_but_values(rounds: int) -> None:
    chance = random.Random(5)
    for _ in range(rounds):
        values = {"".join(chance.choices("xy", k=chance.randint(6, 9))) for _ in range(2)}
        redaction = Redaction([secret(value) for value in values])
        wire = redaction.tripwire()
        payloads = ["".join(chance.choices("xyz", k=chance.randint(0, 60))).encode() for _ in range(3)]
        data, passed, at, is_hit = frames_of(payloads), b"", 0, False
        while at < len(data) and not is_hit:
            size = chance.randint(1, 12)
            more = wire.feed(data[at : at + size])
            is_hit, passed, at = more is None, passed + (more or b""), at + size
            assert is_hit or len(wire._held) <= redaction.reach
        if not is_hit:
            assert passed == data  # also of the last frame nothing is held back
            assert wire.feed(b"", last=True) == b""
        assert is_hit == any(value.encode() in data for value in values)
        assert not any(value.encode() in passed for value in values)


def test_a_frame_passes_once_it_is_whole() -> None:
    wire = Redaction([secret(KEY)]).tripwire()
    frame = frames_of([b"canary"])
    assert [wire.feed(frame[at : at + 1]) for at in range(len(frame))] == [b""] * (len(frame) - 1) + [frame]
    long = frames_of([bytes(100_000)])
    passed = wire.feed(long[:90_000])
    assert passed is not None
    assert len(passed) == 90_000 - Redaction([secret(KEY)]).reach
    assert passed + (wire.feed(long[90_000:]) or b"") == long
    assert wire.feed(frames_of([KEY.encode()])) is None


def test_small_frames_are_followed_in_steps() -> None:
    """Whoever sends tens of thousands at once lets nobody else wait."""
    count, wire = 50_000, Redaction([]).tripwire()
    assert len(list(wire.steps(frames_of([b""]) * count))) > 20


# -- what comes says nothing about a value that it doesn't have --------------------------------------------------------


def as_before(redaction: Redaction, data: bytes) -> int:
    """The weakened build: what could be the beginning of a value is held back, and nothing else."""
    begun = (
        at
        for mark in redaction.marks
        for at in range(max(len(data) - len(mark) + 1, 0), len(data))
        if mark.startswith(data[at:])
    )
    return min(begun, default=len(data))


def sizes(stream: RedactedStream | Tripwire, data: bytes, cuts: Iterable[int]) -> list[int]:
    """How much is passed on of each piece, and at the end."""
    ends = sorted({0, *(min(cut, len(data)) for cut in cuts), len(data)})
    passed = [stream.feed(data[begin:end]) for begin, end in pairwise(ends)]
    return [len(some or b"") for some in (*passed, stream.feed(b"", last=True))]


def blank(data: bytes) -> bytes:
    """Something else with the same line breaks."""
    return re.sub(rb"[^\n]", b".", data)


PIECES = st.lists(st.text("xy.\n", max_size=40).map(str.encode), max_size=6)
CUTS = st.lists(st.integers(0, 200), max_size=12)


@given(values=st.sets(st.text("xy", min_size=6, max_size=14), min_size=1, max_size=2), pieces=PIECES, cuts=CUTS)
@settings(max_examples=150, deadline=None)
def test_how_much_comes_depends_on_sizes_and_line_breaks_only(
    values: set[str], pieces: list[bytes], cuts: list[int]
) -> None:
    """And on whole frames, of a WebSocket."""
    redaction = Redaction([secret(value) for value in values])
    body, framed = b"".join(pieces), frames_of(pieces)
    assume(redaction.whole(body) == body)
    assert sizes(redaction.stream(), body, cuts) == sizes(redaction.stream(), blank(body), cuts)
    others = frames_of([blank(piece) for piece in pieces])
    assume(redaction.whole(framed) == framed)
    assert sizes(redaction.tripwire(), framed, cuts) == sizes(redaction.tripwire(), others, cuts)


API_KEY = "sk-Zq81LmNo+/9 \u00e9"
GUESSES = [*string.ascii_letters, *string.digits, *"-_+/= %\\&;"]
HOW = ["plain", "url path", "json", "html", "base64"]


@pytest.mark.parametrize("is_sound", [True, False])
@pytest.mark.parametrize("how", HOW)
def test_no_guess_is_told_from_another(how: str, is_sound: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what comes next in a value of which a program knows the beginning, in any form of it."""
    if not is_sound:
        monkeypatch.setattr(Redaction, "settled", as_before)
    redaction = Redaction([secret(API_KEY)])
    form = WRITTEN[how](API_KEY).encode().strip(b'"').rstrip(b"=")
    for known in range(4, len(form) - 2, 3):
        for make in (redaction.stream, redaction.tripwire):
            seen = {}
            for guess in GUESSES:
                said = b"." * 10 + form[:known] + guess.encode()
                data = said + b"." * 300
                data = data if make == redaction.stream else frames_of([data])
                seen[guess] = tuple(sizes(make(), data, [len(data) - 300]))
            assert (len(set(seen.values())) == 1) == is_sound
            assert is_sound or seen[chr(form[known])] != seen["_"]


def test_long_values_in_small_pieces_are_looked_for_in_larger_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    redaction = Redaction([secret("ab+/c" * 1600)])
    body = b"." * (1 << 20)

    def once(piece: int) -> float:
        stream, began = redaction.stream(), time.thread_time()
        for at in range(0, len(body), piece):
            stream.feed(body[at : at + piece])
        return time.thread_time() - began

    def cost(piece: int) -> float:
        return min(once(piece) for _ in range(3))

    ours = cost(1 << 10)
    monkeypatch.setattr(redaction, "_least", 0)  # the weakened build: whatever can be passed on is
    assert cost(1 << 10) > 5 * ours


def test_question_marks_are_no_value() -> None:
    """A server that writes Latin-1 has them for other letters. Of some values nothing else is left."""
    answer = b"a ?? b, really????????"
    for value in ("密码密码", "пароль", "a密码b密码c"):
        assert Redaction([secret(value)]).whole(answer + value.encode()).startswith(answer)
    for value in ("canary-密码", "canary-é", "éééé"):
        written = value.encode("latin-1", "replace")
        assert written not in Redaction([secret(value)]).whole(b"it is " + written + b"!")


def test_what_is_looked_for_of_a_long_value_has_a_bound() -> None:
    """A run may have 64 secrets of 8 KiB, and all that is looked for is in the service's memory."""
    for sample in ("+/=~<>&'\"`", "+/=~<>&'\"`\u00e9", "abcdefghi-", "\u5bc6\u7801"):
        value = (sample * 8192)[: 8192 * len(sample) // len(sample.encode())]
        sizes = [sum(map(len, Redaction([secret(value)]).marks))]
        short = (sample * 1024)[: 1024 * len(sample) // len(sample.encode())]
        sizes.append(sum(map(len, Redaction([secret(short)]).marks)))
        assert max(sizes) < 1 << 20, sample


@pytest.mark.parametrize("value", [f"{KEY} ", f"  {KEY}\u2003 "])
@pytest.mark.parametrize("how", WRITTEN)
def test_it_is_found_without_the_blanks_at_its_ends(value: str, how: str) -> None:
    """A header has none there, and a server that repeats it can't know of them."""
    one = secret(value)
    assert Redaction([one]).whole(f"<{value}>".encode()) == f"<{one.placeholder}>".encode()
    found = Redaction([one]).whole(f"<{WRITTEN[how](KEY)}>".encode())
    assert one.placeholder.encode() in found


async def test_a_header_with_a_blank_at_its_end_is_found_when_it_comes_back(lab: Lab) -> None:
    lab.secrets = [secret(f"{KEY} ")]

    async def repeated(head: bytes, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = re.search(rb"Bearer (.*)\r\n", head)
        assert said is not None
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n<%s>" % (len(said[1]) + 2, said[1]))

    lab.answer = repeated
    told = await lab.ask(request("/", f"Authorization: Bearer {lab.token.decode()}"))
    assert KEY.encode() in lab.heard
    assert told.endswith(b"<" + lab.token + b">")


def test_short_values_are_not_looked_for() -> None:
    assert not Redaction([secret("12345")])
    assert Redaction([secret("12345")]).whole(b"12345") == b"12345"
    assert Redaction([secret("123456")]).whole(b"123456") != b"123456"


def raw(data: bytes) -> bytes:
    return zlib.compress(data, wbits=-15)


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress, raw], ids=["gzip", "zlib", "raw"])
def test_compressed_bodies_are_read(compress: Callable[[bytes], bytes]) -> None:
    content = random.Random(1).randbytes(1000) + bytes(1 << 20)
    data = compress(content) + (compress(content) if compress is gzip.compress else b"")
    for size in (1, 1000, len(data)):
        inflate, found = Inflate(), b""
        for at in range(0, len(data), size):
            assert at == 0 or not inflate.complete or compress is gzip.compress
            for piece in inflate.feed(data[at : at + size]):
                assert len(piece) <= 1 << 16
                found += piece
        assert found == content * (2 if compress is gzip.compress else 1)
        assert inflate.complete


# -- on connections -------------------------------------------------------------------------------------------------


def saying(answer: bytes) -> Answer:
    async def say(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        raise ConnectionError

    return say


def split(answer: bytes) -> tuple[bytes, bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.lower(), body


async def test_a_small_body_has_its_new_length(lab: Lab) -> None:
    said = VALUE.encode()
    lab.answer = saying(b"HTTP/1.1 200 OK\r\nA: 1\r\nContent-Length: %d\r\nB: 2\r\n\r\n%b" % (len(said), said))
    head, body = split(await lab.ask(request()))
    assert body == lab.token
    assert head.endswith(b"a: 1\r\ncontent-length: %d\r\nb: 2\r\nconnection: close" % len(body))


async def test_a_large_body_comes_in_chunks(lab: Lab) -> None:
    said = VALUE.encode() * 10_000
    lab.answer = saying(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said))
    head, body = split(await lab.ask(request()))
    assert b"content-length" not in head
    assert b"transfer-encoding: chunked" in head
    assert body.endswith(b"\r\n0\r\n\r\n")
    content, at = b"", 0
    while size := int(body[at : (end := body.index(b"\r\n", at))], 16):
        content += body[end + 2 : end + 2 + size]
        at = end + 2 + size + 2
    assert content == lab.token * 10_000


async def test_an_answer_to_head_keeps_the_length(lab: Lab) -> None:
    lab.answer = saying(b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\nX: %b\r\n\r\n" % KEY.encode())
    lab.secrets[1] = secret(KEY)
    head, body = split(await lab.ask(request(method="HEAD")))
    assert (b"content-length: 999999" in head, KEY.encode() in head, body) == (True, False, b"")


async def test_headers_that_say_how_to_read_an_answer_stay(lab: Lab) -> None:
    """Also where a value is the same: what a secret may be chosen to be is no reason to break answers."""
    size = 100_000
    lab.secrets[1] = secret(str(size))
    lab.secrets[0] = secret("chunked")
    lab.answer = saying(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (size, bytes(size)))
    assert split(await lab.ask(request()))[1].count(b"\0") == size
    lab.answer = saying(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nfine\r\n0\r\n\r\n")
    assert b"fine" in split(await lab.ask(request()))[1]


def in_chunks(pieces: list[bytes]) -> bytes:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


def compressed_in_chunks(pieces: list[bytes]) -> bytes:
    packer = zlib.compressobj(0, wbits=31)  # as stored blocks: how well it compresses shall make no difference
    packed = [packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH) for piece in pieces]
    return in_chunks([*packed, packer.flush()]).replace(b"OK\r\n", b"OK\r\nContent-Encoding: gzip\r\n")


@pytest.mark.parametrize("is_sound", [True, False])
@pytest.mark.parametrize("write", [in_chunks, compressed_in_chunks])
async def test_the_chunks_of_an_answer_tell_no_guess_from_another(
    lab: Lab, write: Callable[[list[bytes]], bytes], is_sound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server never says the value, but what the program has it say."""
    if not is_sound:
        monkeypatch.setattr(Redaction, "settled", as_before)
    lab.secrets[1] = secret("sk-Zq81LmNo")
    chunks = []
    for guess in (b"sk-Z", b"sk-Y"):
        lab.answer = saying(write([b"." * 10 + guess, b"." * 500, b"a line\n"]))
        body = split(await lab.ask(request()))[1]
        chunks.append([int(size, 16) for size in re.findall(rb"(?:^|\r\n)([0-9a-f]+)(?=\r\n)", body)])
    assert (chunks[0] == chunks[1]) == is_sound
    assert [sum(each) for each in chunks] == [521, 521]


async def test_values_in_names_of_headers_are_found(lab: Lab) -> None:
    lab.secrets[1] = secret(KEY)
    key = KEY.encode()
    lab.answer = saying(
        b"HTTP/1.1 200 OK\r\nX-%b: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nY-%b: 2\r\n\r\n" % (key, key)
    )
    answer = await lab.ask(request())
    assert KEY.encode() not in answer
    assert answer.lower().count(lab.secrets[1].placeholder.lower().encode()) == 2


async def test_a_body_that_ends_early_is_a_502(lab: Lab) -> None:
    for said in (
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 4\r\n\r\n1234",
        b"HTTP/1.1 206 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n1234",
    ):
        lab.answer = saying(said)
        assert (await lab.ask(request())).startswith(b"HTTP/1.1 502 ")
    lab.answer = saying(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(bytes(999))[:-9])
    assert not (await lab.ask(request())).endswith(b"0\r\n\r\n")


async def test_nothing_compressed_is_asked_for(lab: Lab) -> None:
    await lab.ask(request("/", "Accept-Encoding: gzip", "accept-encoding: br", "Sec-WebSocket-Extensions: x"))
    assert lab.heard.lower().count(b"accept-encoding") == 1
    assert b"Accept-Encoding: identity\r\n" in lab.heard
    assert b"extensions" not in lab.heard.lower()


async def test_of_other_protocols_only_websockets_are_asked_for(lab: Lab) -> None:
    """HTTP/2 compresses headers."""
    for upgrade in ("h2c", "websocket, h2c", "TLS/1.0"):
        lab.answer = saying(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n" + VALUE.encode()
        )
        asked = request("/", f"Upgrade: {upgrade}", "HTTP2-Settings: AAMA").replace(
            b"close", b"Upgrade, HTTP2-Settings"
        )
        assert (await lab.ask(asked)).startswith(b"HTTP/1.1 502 ")
    assert b"h2c" not in lab.heard
    assert b"AAMA" not in lab.heard


@pytest.mark.parametrize("method", ["TRACE", "trace", "TRACK"])
async def test_what_repeats_the_request_is_refused(lab: Lab, method: str) -> None:
    assert (await lab.ask(request(method=method))).startswith(b"HTTP/1.1 405 ")
    assert lab.heard == b""


@pytest.mark.parametrize("weakened", [False, True], ids=["sound", "weakened"])
@pytest.mark.parametrize("size", [100, 60_000, 70_000, 250_000, 3_000_000])
async def test_a_first_piece_of_any_size_is_looked_into(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, size: int, weakened: bool
) -> None:
    """Over plain HTTP, where a program writes head and body at once."""
    if weakened:
        read = interception._host_header
        monkeypatch.setattr(interception, "_host_header", lambda head: read(head) if len(head) <= MAX_HEAD else "")
    body = bytes(size)
    asked = request("/", f"X: {lab.token.decode()}", body=body, method="POST")
    assert (await lab.ask(asked, authority=None)).endswith(b"fine")
    assert (VALUE.encode() in lab.heard) == (not weakened or size < MAX_HEAD)
    assert lab.heard.endswith(body)


def test_the_bound_of_held_bodies_is_small() -> None:
    """Each of a run's connections may hold one."""
    assert exchange._MAX_HELD <= 1 << 16
