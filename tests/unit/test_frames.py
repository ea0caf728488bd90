"""Frames of WebSockets: those that pass by, where they end, and those that are read, as messages."""

from __future__ import annotations

import random

import pytest

from era.core.concurrency import frames


def masked(opcode: int, data: bytes, *, is_final: bool = True) -> bytes:
    """A frame as a client sends it."""
    frame = frames.made(opcode, data)
    head, mask = frame[: len(frame) - len(data)], b"mask"
    payload = bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))
    return bytes([head[0] & (0xFF if is_final else 0x7F), head[1] | 0x80]) + head[2:] + mask + payload


def test_where_frames_end_is_known_however_they_are_cut() -> None:
    rng = random.Random(1)
    for sizes in (
        [0, 1, 125, 126, 127, 65_535, 65_536],
        [rng.choice([0, 3, 125, 126, 700]) for _ in range(20)],
    ):
        sent, ends = b"", set()
        for size in sizes:
            frame = frames.made(frames.BINARY, bytes(size))
            if rng.random() < 0.5:  # as a client would send it
                head = frame[: len(frame) - size]
                frame = head[:1] + bytes([head[1] | 0x80]) + head[2:] + b"mask" + bytes(size)
            sent += frame
            ends.add(len(sent))
        for longest in (3, 1000, len(sent)):
            follower, at, count = frames.FrameFollower(), 0, 0
            while at < len(sent):
                piece = sent[at : at + rng.randint(1, longest)]
                end = min(each for each in ends | {0} if each >= at)
                assert follower.left_of_frame(piece) == min(end - at, len(piece))
                count += follower.follow(piece)
                at += len(piece)
                assert follower.is_between == (at in ends)
                assert follower.under_way == at - max(each for each in ends | {0} if each <= at)
            assert (count, follower.has_closed) == (len(sizes), False)
            for piece, is_between in ((frames.closing(1000)[:1], False), (frames.closing(1000)[1:], True)):
                follower.follow(piece)
                assert follower.is_between == is_between
            assert follower.has_closed


def test_messages_are_read_however_they_are_cut() -> None:
    rng = random.Random(2)
    binary, text = rng.randbytes(70_001), "ä€" * 999
    sent = masked(frames.BINARY, binary[:700], is_final=False) + masked(frames.PING, b"?")
    sent += masked(frames.CONTINUATION, b"", is_final=False) + masked(frames.CONTINUATION, binary[700:])
    sent += masked(frames.TEXT, text.encode()[:7], is_final=False) + masked(frames.CONTINUATION, text.encode()[7:])
    sent += masked(frames.TEXT, b"") + masked(frames.BINARY, b"") + masked(frames.CLOSE, b"")
    for longest in (3, 1000, len(sent)):
        reader, at, found = frames.FrameReader(1 << 20, 1 << 16), 0, list[frames.Frame]()
        while at < len(sent):
            size = rng.randint(1, longest)
            found += reader.feed(sent[at : at + size])
            at += size
        assert b"".join(each.data for each in found if each.opcode == frames.BINARY) == binary
        others = [(each.opcode, each.data) for each in found if each.opcode != frames.BINARY]
        assert others == [
            (frames.PING, b"?"),
            (frames.TEXT, text.encode()),
            (frames.TEXT, b""),
            (frames.CLOSE, b""),
        ]


def test_of_a_message_in_binary_nothing_is_kept() -> None:
    reader, sent = frames.FrameReader(1 << 20, 1 << 16), masked(frames.BINARY, bytes(1 << 20))
    given = [
        each for at in range(0, len(sent) - 1, 1000) for each in reader.feed(sent[at : min(at + 1000, len(sent) - 1)])
    ]
    assert sum(len(each.data) for each in given) == (1 << 20) - 1, "it is given out before it is complete"


@pytest.mark.parametrize(("opcode", "most"), [(frames.BINARY, 1000), (frames.TEXT, 100)])
@pytest.mark.parametrize("is_cut", [False, True])
def test_messages_that_are_too_long(opcode: int, most: int, is_cut: bool) -> None:
    def sent(size: int) -> bytes:
        if not is_cut:
            return masked(opcode, bytes(size))
        return masked(opcode, bytes(50), is_final=False) + masked(frames.CONTINUATION, bytes(size - 50))

    assert sum(len(each.data) for each in frames.FrameReader(1000, 100).feed(sent(most))) == most
    with pytest.raises(frames.BadFrame) as raised:
        list(frames.FrameReader(1000, 100).feed(sent(most + 1)))
    assert raised.value.code == frames.TOO_BIG


def test_a_close_is_noticed_behind_what_was_read_in_part() -> None:
    sent = masked(frames.BINARY, bytes([0x88] * 1000)) + masked(frames.CLOSE, b"")
    for at in range(0, len(sent)):
        reader = frames.FrameReader(1 << 20, 1 << 16)
        list(reader.feed(sent[:at]))
        follower = reader.follower()
        follower.follow(sent[at:])
        assert follower.has_closed
