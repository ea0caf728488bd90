"""Who loses a connection when there are too many."""

from __future__ import annotations

from typing import Any

import pytest

from era.api.protocol.protocol import Callers


class Connection:
    def __init__(self, *, is_half_open: bool = True) -> None:
        self.is_half_open = is_half_open
        self.given_up = False

    def give_up(self) -> None:
        self.given_up = True


def opened(callers: Callers, address: str, count: int, *, is_half_open: bool = True) -> list[Any]:
    """Those of so many that weren't refused."""
    tried: list[Any] = [Connection(is_half_open=is_half_open) for _ in range(count)]
    return [each for each in tried if callers.opened(each, address)]


def left(connections: list[Connection]) -> int:
    return sum(not each.given_up for each in connections)


def test_a_caller_with_too_many_loses_his_own_oldest() -> None:
    callers = Callers(100)
    other = opened(callers, "192.0.2.2", 10)
    flood = opened(callers, "192.0.2.1", 1000)
    assert [each.given_up for each in flood] == [True] * 955 + [False] * 45
    assert left(other) == 10
    assert len(callers) == 55


def test_those_with_a_request_stay_and_one_more_is_refused() -> None:
    callers = Callers(100)
    busy = opened(callers, "192.0.2.1", 1000, is_half_open=False)
    assert len(busy) == 50
    assert left(busy) == 50
    assert opened(callers, "192.0.2.1", 1) == []
    callers.closed(busy[0])
    assert len(opened(callers, "192.0.2.1", 2)) == 2  # the second in the place of the first


def test_who_has_none_yet_gets_one_even_if_many_others_have_all() -> None:
    callers = Callers(100)
    floods = [opened(callers, f"192.0.2.{number}", 100) for number in range(100)]
    assert len(callers) <= 100
    assert all(left(flood) for flood in floods[-50:])
    assert len(opened(callers, "198.51.100.1", 1)) == 1


def test_what_was_waiting_longest_goes_first() -> None:
    callers = Callers(6)
    first, second, third = opened(callers, "192.0.2.1", 3)
    callers.waits(first)
    assert len(opened(callers, "192.0.2.1", 2)) == 2
    assert (first.given_up, second.given_up, third.given_up) == (False, True, True)


@pytest.mark.parametrize(
    ("one", "another", "is_same"),
    [
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("", "", True),
    ],
)
def test_who_is_one_caller(one: str, another: str, is_same: bool) -> None:
    callers = Callers(100)
    first = opened(callers, one, 50)
    opened(callers, another, 20)
    assert (left(first) < 50) == is_same


def test_nothing_is_left_of_closed_ones() -> None:
    callers = Callers(40)
    made = [one for number in range(9) for one in opened(callers, f"192.0.2.{number % 4}", 30)]
    for one in made:
        callers.closed(one)
    assert len(callers) == 0
    assert (callers._shares.taken, dict(callers._shares._held), callers._of) == (0, {}, {})
