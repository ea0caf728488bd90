"""The connect filter, and what is read of DNS messages: anything may stand there."""

from __future__ import annotations

import asyncio
import contextlib
import platform
import random
import struct
from ipaddress import ip_address

import pytest

from era.core.allowlist import allowlist
from era.guest import connect_filter
from era.network import dns
from tests.drivers.bpf import ALLOW, _run
from tests.network import world

NATIVE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[platform.machine()]
NOTIFY = 0x7FC00000
DONTWAIT, NOSIGNAL = 0x40, 0x4000


@pytest.mark.parametrize("gvisor", [False, True])
def test_the_filter_notifies_of_these_calls_and_lets_all_others_pass(*, gvisor: bool) -> None:
    _, _, connect, sendto, sendmsg, sendmmsg = connect_filter._MACHINES[platform.machine()]
    program = connect_filter._filter(gvisor=gvisor)
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


def test_a_name_that_is_not_allowed_is_not_asked_for() -> None:
    refused: list[str] = []
    one = dns.Names(allowlist(["*.example.test"]), refused.append)
    answer = asyncio.run(one._resolve(query("secret.leak.test"), stream=False))
    assert (answer[:2], answer[3] & 15, answer[12:]) == (b"\x12\x34", 3, query("secret.leak.test")[12:])
    assert refused == ["secret.leak.test"]
