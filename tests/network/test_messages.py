"""The connect filter, and what is read of DNS messages: anything may stand there."""

from __future__ import annotations

import asyncio
import contextlib
import platform
import random
import re
import socket
import struct
import time
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address

import pytest

from era.core.allowlist import allowlist, folded
from era.core.concurrency.shares import Shares
from era.guest import connect_filter
from era.network import dns
from era.network.descriptors import RunDescriptors
from tests.drivers.bpf import ALLOW, _run
from tests.network import world

NATIVE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[platform.machine()]
NOTIFY = 0x7FC00000
DONTWAIT, NOSIGNAL = 0x40, 0x4000


def plenty() -> tuple[RunDescriptors, dns.Turn]:
    """What a run's nameserver needs in order to ask."""
    return RunDescriptors(Shares(100), "me"), partial(dns.Lookups().turn, "me", "a sandbox")


@pytest.mark.parametrize("gvisor", [False, True])
def test_the_filter_notifies_of_these_calls_and_lets_all_others_pass(*, gvisor: bool) -> None:
    known = connect_filter._MACHINES[platform.machine()]
    _, _, connect, sendto, sendmsg, sendmmsg = known
    program = connect_filter._filter(known, gvisor=gvisor)
    flags = DONTWAIT if gvisor else 0

    def answer(call: int, *arguments: int, machine: int = NATIVE) -> int:
        words = [*arguments, *[0] * 6][:6]
        return _run(program, struct.pack("<iIQ6Q", call, machine, 0, *words))

    for call in range(-1, 1000):
        messages = flags if call == sendmsg else 16, flags if call == sendmmsg else 0
        notified = answer(call, 3, 1 << 40, *messages, 1 << 40, 16) == NOTIFY
        assert notified == (call in (connect, sendto, sendmsg, sendmmsg)), call
        assert answer(call, 3, 1 << 40, *messages, 1 << 40, 16, machine=0x40000003) == ALLOW
    assert answer(sendto, 3, 1, 1, 0, 0, 0) == ALLOW
    assert answer(sendto, 3, 1, 1, 0, 1, 0) == answer(sendto, 3, 1, 1, 0, 1 << 32, 0) == NOTIFY
    for allowed in (0,) if gvisor else (NOSIGNAL, NOSIGNAL | DONTWAIT):
        assert answer(sendmsg, 3, 1, allowed) == answer(sendmmsg, 3, 1, 1, allowed) == ALLOW
    for watched in (DONTWAIT,) if gvisor else (0, DONTWAIT):
        assert answer(sendmsg, 3, 1, watched) == answer(sendmmsg, 3, 1, NOSIGNAL, watched) == NOTIFY


def query(name: str, kind: int = 1) -> bytes:
    labels = b"".join(bytes([len(one)]) + one.encode() for one in name.split("."))
    return b"\x12\x34" + struct.pack("!HHHHH", 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", kind, 1)


def test_names_and_addresses_are_read() -> None:
    assert dns._question(query("Www.Example.TEST")) == ("www.example.test", len(query("www.example.test")))
    assert dns._addresses(world.resolved(query("www.example.test"))) == [ip_address(world.PUBLIC)]
    assert dns._addresses(world.resolved(query("both.test", 28))) == [ip_address("2001:db8:77::99")]
    assert dns._addresses(world.resolved(query("no.such.test"))) == []
    # One name leads to another, which has the address; both names are written out and not pointed to.
    alias = b"\1a\4test\0" + struct.pack("!HHIH", 5, 1, 0, 8) + b"\1b\4test\0"
    address = b"\1b\4test\0" + struct.pack("!HHIH", 1, 1, 0, 4) + bytes([203, 0, 113, 10])
    message = query("a.test")
    message = message[:6] + b"\0\2" + message[8:] + alias + address
    assert dns._addresses(message) == [ip_address(world.PUBLIC)]


def test_nonsense_is_survived() -> None:
    rng = random.Random(7)
    good = world.resolved(query("www.example.test"))
    for n in range(20_000):
        message = bytearray(good if n % 2 else rng.randbytes(rng.randrange(80)))
        for _ in range(rng.randrange(4)):
            if message:
                message[rng.randrange(len(message))] = rng.randrange(256)
        del message[rng.randrange(len(message) + 1) :]
        dns._addresses(bytes(message))
        with contextlib.suppress(ValueError, IndexError):
            dns._question(bytes(message))
        answer = dns._refusal(bytes(message), 12, 2)
        assert len(answer) == 12


OPT = b"\0" + struct.pack("!HHIH", 41, 4096, 0x8000, 0)


def asked(message: bytes, *, stream: bool = False) -> tuple[bytes, bytes]:
    """What a nameserver is asked for this message, and what the program is told."""
    heard: list[bytes] = []

    async def ask(_: object, query: bytes) -> bytes:
        heard.append(query)
        return world.resolved(query)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dns, "_ask_tcp" if stream else "_ask_udp", ask)
        answer = asyncio.run(dns.Names(allowlist([]), lambda _: None, *plenty())._resolve(message, stream=stream))
    return b"".join(heard), answer


@pytest.mark.parametrize("stream", [False, True])
def test_of_a_query_only_its_question_is_asked(*, stream: bool) -> None:
    plain = query("Www.Example.TEST")
    answer = world.resolved(plain)
    extra = b"\6canary\0" + struct.pack("!HHIH", 1, 1, 0, 4) + bytes(4)
    for message, edns in (
        (plain, b""),
        (plain[:2] + b"\x07\xff" + plain[4:], b""),  # with every flag that a query may have, and none of it ours
        (plain[:2] + b"\0\0" + plain[4:], b""),
        (plain + b"canary", b""),
        (plain[:7] + b"\1\0\1\0\1" + plain[12:] + extra * 3, b""),
        (plain[:11] + b"\1" + plain[12:] + extra, b""),
        (plain[:11] + b"\1" + plain[12:] + OPT, b"\0\0\x29\x04\xd0\0\0\x80\0\0\0"),
        (plain[:11] + b"\1" + plain[12:] + OPT[:-2] + b"\0\6canary", b"\0\0\x29\x04\xd0\0\0\x80\0\0\0"),
        (plain[:11] + b"\1" + plain[12:] + OPT[:4], b""),
    ):
        sent, told = asked(message, stream=stream)
        assert sent[:2] != b"\x12\x34"
        assert sent[2:] == plain[2:11] + bytes([len(edns) > 0]) + plain[12:] + edns
        assert told == answer


def test_a_dot_within_a_label_is_no_dot_between_labels() -> None:
    """Who may ask for api.example.test would get a name of somebody else's otherwise, which is written the same."""
    whole = query("api.example.test")
    joined = whole[:12] + b"\x0bapi.example\4test\0" + whole[-4:]
    sent, told = asked(joined)
    assert (sent, told[3] & 15) == (b"", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dns, "_LABEL", re.compile(rb"[\x21-\x7e]+"))
        assert dns._question(joined)[0] == dns._question(whole)[0]


@pytest.mark.parametrize("kind", [0, 41, 250, 251, 252, 253, 254, 255])
def test_zone_transfers_and_the_like_are_refused(kind: int) -> None:
    sent, told = asked(query("example.test", kind))
    assert (sent, told[:2], told[3] & 15, told[12:]) == (b"", b"\x12\x34", 5, query("example.test", kind)[12:])


def test_other_operations_and_classes_are_refused() -> None:
    good = query("example.test")
    for operation in range(1, 16):
        sent, told = asked(good[:2] + bytes([operation << 3 | 1]) + good[3:])
        assert (sent, told[2] >> 3 & 15, told[3] & 15) == (b"", operation, 4)
    for of_class in (0, 3, 254, 255):
        sent, told = asked(good[:-2] + of_class.to_bytes(2))
        assert (sent, told[3] & 15) == (b"", 5)
    sent, told = asked(good[:2] + b"\x81\x80" + good[4:])  # a response
    assert (sent, told[3] & 15) == (b"", 1)
    long = query(".".join(["a" * 63] * 4))
    assert asked(long)[0] == b""


def test_a_name_that_is_not_allowed_is_not_asked_for() -> None:
    refused: list[str] = []
    one = dns.Names(allowlist(["*.example.test"]), refused.append, *plenty())
    answer = asyncio.run(one._resolve(query("secret.leak.test"), stream=False))
    assert (answer[:2], answer[3] & 15, answer[12:]) == (b"\x12\x34", 3, query("secret.leak.test")[12:])
    assert refused == ["secret.leak.test"]


def seconds_of_processor(*calls: Callable[[], object]) -> list[float]:
    """What ten of each take at best."""
    taken = []
    for call in calls:
        tries = []
        for _ in range(5):
            started = time.process_time()
            for _ in range(10):
                with contextlib.suppress(ValueError):
                    call()
            tries.append(time.process_time() - started)
        taken.append(min(tries))
    return taken


def test_a_name_that_is_too_long_costs_no_more_than_the_longest() -> None:
    """All runs' names are looked at by one event loop."""
    longest, endless = query(".".join(["a"] * 126)), query(".".join(["a"] * 32_000))
    with pytest.raises(ValueError, match="no name"):
        dns._question(endless)
    least, most = seconds_of_processor(lambda: dns._question(longest), lambda: dns._question(endless))
    assert most < 10 * least
    hosts = "é" * 60, "é" * 60_000
    least, most = seconds_of_processor(*(partial(folded, host) for host in hosts))
    assert most < 10 * least


async def test_a_stream_of_what_is_no_query_ends() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.sendall((65_000).to_bytes(2) + bytes(65_000))
        with pytest.raises(ConnectionError, match="no query"):
            await dns.Names(allowlist([]), lambda _: None, *plenty()).serve_stream(ours)


def test_an_answer_of_thousands_of_addresses_is_not_read_to_its_end() -> None:
    record = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 60, 4)
    answers = b"".join(record + number.to_bytes(4) for number in range(4000))
    answer = bytearray(query("a.example") + answers)
    struct.pack_into("!H", answer, 6, 4000)
    assert len(dns._addresses(bytes(answer))) == dns._MAX_ADDRESSES
