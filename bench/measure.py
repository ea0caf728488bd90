"""Measuring in rounds: each has a few calls of every case, so a slow moment hits both a case and its rival."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.arena import Arena
from bench.cases import Case, Probe, Ratio
from bench.processor import TICK, used_by_others

type Times = Mapping[str, Sequence[Sequence[float]]]
"""Seconds of each call, by case name, then round."""

_SETTLE = 0.05
"""Seconds after a call within which what it leaves to do is done."""


@dataclass(frozen=True, slots=True)
class Measured:
    """All that was measured."""

    times: Times
    processor: Mapping[str, Sequence[float]]
    """Seconds of processor time that a call took of all but this process, by case, then round. Only of those cases that
    ask for it."""
    load: Sequence[float]
    """The machine's load, its mean of the last minute, at the end of each round."""


def measure(cases: Sequence[Case], arena: Arena, rounds: int, quick: bool, progress: Callable[[int], None]) -> Measured:
    """Measure the cases.

    `quick` makes one call of each case in a round. `progress` gets the number of finished rounds. Every second round
    goes through the cases backwards, so that the effects of one case on the next even out.
    """
    probes = {}
    for case in cases:
        arena.keep_open()  # setting up the case before may have taken a while
        probes[case.name] = case.start(arena)
    arena.wait_for_pool()
    for case in () if quick else cases:  # an unmeasured first call fills caches
        _one_round(case, probes[case.name], arena, 1)
    times: dict[str, list[list[float]]] = {case.name: [] for case in cases}
    processor: dict[str, list[float]] = {case.name: [] for case in cases if case.processor}
    load = []
    for number in range(rounds):
        for case in cases if number % 2 == 0 else reversed(cases):
            calls = 1 if quick else case.burst
            used = used_by_others() if case.processor else 0.0
            times[case.name].append(_one_round(case, probes[case.name], arena, calls))
            if case.processor:
                time.sleep(_SETTLE)
                processor[case.name].append((used_by_others() - used) / (calls * probes[case.name].runs))
        load.append(os.getloadavg()[0])
        progress(number + 1)
    return Measured(times, processor, load)


def _one_round(case: Case, probe: Probe, arena: Arena, calls: int) -> list[float]:
    """Seconds of each of `calls` calls."""
    seconds = []
    with probe.around():
        for _ in range(calls):
            arena.keep_open()
            prepared = probe.before()
            time.sleep(case.pause)
            began = time.perf_counter()
            answer = probe.call(prepared)
            seconds.append(time.perf_counter() - began)
            probe.after(answer)
    return seconds


def summary(rounds: Sequence[Sequence[float]]) -> dict[str, float]:
    """Median, 95th percentile and minimum of a case's calls in milliseconds, all rounds together, and their number."""
    calls = [seconds * 1000 for each_round in rounds for seconds in each_round]
    return {"p50": statistics.median(calls), "p95": _quantile(calls, 0.95), "min": min(calls), "n": len(calls)}


def spread(ratio: Ratio, measured: Measured) -> dict[str, float | None]:
    """Median, quartiles and extremes, over the rounds, of the ratio of the two quantiles in each round."""
    times: Times = measured.times
    if ratio.processor:
        # The kernel counts in steps: a rival that took none of them took about one.
        times = {name: [[max(used, TICK)] for used in rounds] for name, rounds in measured.processor.items()}
    pairs = zip(times[ratio.case], times[ratio.rival], strict=True)
    other = ratio.quantile if ratio.rival_quantile is None else ratio.rival_quantile
    ratios = [_quantile(case, ratio.quantile) / _quantile(rival, other) for case, rival in pairs]
    return {
        "median": statistics.median(ratios),
        "q1": _quantile(ratios, 0.25),
        "q3": _quantile(ratios, 0.75),
        "min": min(ratios),
        "max": max(ratios),
        "goal": ratio.goal,
    }


def _quantile(values: Iterable[float], quantile: float) -> float:
    """The quantile (0 to 1), interpolated linearly between the two nearest values."""
    ordered = sorted(values)
    position = quantile * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
