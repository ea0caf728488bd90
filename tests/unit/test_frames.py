"""Frames of WebSockets that pass by: where they end."""

from __future__ import annotations

import random

from era.api import frames


def test_where_frames_end_is_known_however_they_are_cut() -> None:
    rng = random.Random(1)
    for sizes in (
        [0, 1, 125, 126, 127, 65_535, 65_536],
        [rng.choice([0, 3, 125, 126, 700, 70_000]) for _ in range(20)],
    ):
        sent, ends = b"", set()
        for size in sizes:
            frame = frames.made(frames.BINARY, bytes(size))
            if rng.random() < 0.5:  # as a client would send it
                head = frame[: len(frame) - size]
                frame = head[:1] + bytes([head[1] | 0x80]) + head[2:] + b"mask" + bytes(size)
            sent += frame
            ends.add(len(sent))
        for longest in (1, 3, 1000, len(sent)):
            follower, at, count = frames.FrameFollower(), 0, 0
            while at < len(sent):
                piece = sent[at : at + rng.randint(1, longest)]
                end = min(each for each in ends | {0} if each >= at)
                assert follower.left_of_frame(piece) == min(end - at, len(piece))
                count += follower.follow(piece)
                at += len(piece)
                assert follower.is_between == (at in ends)
            assert (count, follower.has_closed) == (len(sizes), False)
            for piece, is_between in ((frames.closing(1000)[:1], False), (frames.closing(1000)[1:], True)):
                follower.follow(piece)
                assert follower.is_between == is_between
            assert follower.has_closed
