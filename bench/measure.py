"""Rounds: every case a few times in each, so that a slow moment of the machine is shared by a case and its rival."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from bench.arena import Arena
from bench.cases import Case, Probe, Ratio

type Times = Mapping[str, Sequence[Sequence[float]]]
"""Seconds of each call, by case, then round."""


def measure(cases: Sequence[Case], arena: Arena, rounds: int, quick: bool, tell: Callable[[int], None]) -> Times:
    """`quick` makes one call a round of each case.

    Every other round goes through the cases backwards: what one leaves behind for the next then evens out.
    """
    probes = {}
    for case in cases:
        arena.keep_open()  # what others need before they are ready may take a while
        probes[case.name] = case.start(arena)
    arena.wait_for_pool()
    for case in () if quick else cases:  # neither the first call of a kind nor a cold cache is what we are after
        _one_round(case, probes[case.name], arena, 1)
    times: dict[str, list[list[float]]] = {case.name: [] for case in cases}
    for number in range(rounds):
        for case in cases if number % 2 == 0 else reversed(cases):
            times[case.name].append(_one_round(case, probes[case.name], arena, 1 if quick else case.burst))
        tell(number + 1)
    return times


def _one_round(case: Case, probe: Probe, arena: Arena, calls: int) -> list[float]:
    taken = []
    with probe.around():
        for _ in range(calls):
            arena.keep_open()
            given = probe.before()
            time.sleep(case.pause)
            began = time.perf_counter()
            answer = probe.call(given)
            taken.append(time.perf_counter() - began)
            probe.after(answer)
    return taken


def summary(rounds: Sequence[Sequence[float]]) -> dict[str, float]:
    """Milliseconds of a case, all rounds together."""
    taken = [seconds * 1000 for one in rounds for seconds in one]
    return {"p50": statistics.median(taken), "p95": _quantile(taken, 0.95), "min": min(taken), "n": len(taken)}


def spread(ratio: Ratio, times: Times) -> dict[str, float | None]:
    """The ratio of the two medians of each round (or whichever quantile is compared), over the rounds."""
    pairs = zip(times[ratio.case], times[ratio.rival], strict=True)
    each = [_quantile(case, ratio.quantile) / _quantile(rival, ratio.quantile) for case, rival in pairs]
    return {
        "median": statistics.median(each),
        "q1": _quantile(each, 0.25),
        "q3": _quantile(each, 0.75),
        "min": min(each),
        "max": max(each),
        "goal": ratio.goal,
    }


def _quantile(values: Iterable[float], part: float) -> float:
    """Linear between the two nearest."""
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
