"""Output and events of a cell, put in order by marks (core/live/kernel_frames.py)."""

from __future__ import annotations

from itertools import permutations

import pytest

from era.core.live import kernel_frames
from era.core.live.kernel_frames import CellOrder
from era.core.program import CellEvent, Output

EVENT, END = b"\0era:event\0", b"\0era:end\0"
ONE, TWO = CellEvent(b'"one"'), CellEvent(b'"two"')


def order() -> CellOrder:
    return CellOrder({1: "stdout", 2: "stderr"}, EVENT, END)


def taken(order: CellOrder, *, rest: bool = False) -> list[str]:
    """What is given out: output as its text, events by their content."""
    items = order.rest() if rest else order.take()
    return [item.data.decode() if isinstance(item, Output) else item.content.decode() for item in items]


def test_order_is_that_of_the_marks_whatever_comes_first() -> None:
    parts = {
        "stdout": lambda order: order.write(1, b"a" + EVENT + b"b" + EVENT + b"c"),
        "stderr": lambda order: order.write(2, EVENT + EVENT),
        "one": lambda order: order.show(ONE, (1, 2)),
        "two": lambda order: order.show(TWO, (1, 2)),
    }
    for arrival in permutations(parts):
        if arrival.index("one") > arrival.index("two"):
            continue
        made, given = order(), list[str]()
        for name in arrival:
            parts[name](made)
            given += taken(made)
        assert given == ["a", '"one"', "b", '"two"', "c"], arrival


@pytest.mark.parametrize("size", range(1, 14))
def test_marks_may_come_in_pieces(size: int) -> None:
    made, given, behind = order(), "", b""
    made.show(ONE, (1,))
    written = b"a\0era:b" + EVENT + b"\0era:e" + END + b"next"
    for at in range(0, len(written), size):
        behind += made.write(1, written[at : at + size])
        given += "".join(taken(made))
    assert (given, behind) == ('a\0era:b"one"\0era:e', b"next")
    assert made.has_ended(1)


def test_rest_has_what_waits_for_marks_or_events_that_never_come() -> None:
    made = order()
    made.write(1, b"a" + EVENT + b"b\0era:")
    made.show(ONE, (2,))
    assert taken(made) == ["a"]
    assert sorted(taken(made, rest=True)) == ['"one"', "b\0era:"]


def test_marks_without_events_hold_back_no_more_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_frames, "HELD_BYTES", 1000)
    made, given, most = order(), 0, 0
    for _ in range(100):
        made.write(1, EVENT + b"x" * 90)
        given += sum(map(len, taken(made)))
        most = max(most, made._held_bytes)
    assert most < 1200
    assert given + made._held_bytes >= 9000 - 90
    made.write(2, b"goes on")
    assert taken(made) == ["goes on"]


def test_events_without_marks_hold_back_no_more_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_frames, "HELD_EVENTS", 10)
    made, given = order(), list[str]()
    for _ in range(30):
        made.show(ONE, (1,))
        given += taken(made)
        assert len(made._events) <= 10
    assert len(given) == 30
