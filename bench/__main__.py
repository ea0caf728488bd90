"""`python -m bench`: measure, print the figures, and exit with 0 unless a case could not be run."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from pathlib import Path

from rich.console import Console

from bench import memory, revisions
from bench.arena import DISK, arena
from bench.lists import CASES, RATIOS
from bench.measure import measure
from bench.page import page
from bench.report import machine, show, summarize

_ROUNDS, _QUICK_ROUNDS, _AGAINST_ROUNDS = 20, 1, 8


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # and what was started ends, too
    parser = argparse.ArgumentParser("python -m bench", description="Measure ERA beside its rivals.")
    parser.add_argument("--quick", action="store_true", help="one short round, to see whether every case runs")
    parser.add_argument("--rounds", type=int, help=f"number of rounds (default {_ROUNDS})")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="cases whose name begins with one of these, and their rivals; `memory` asks for what sessions take of it",
    )
    parser.add_argument(
        "--against",
        metavar="REVISION",
        help="compare the working tree with this revision of git, side by side, by a few cases",
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="write a page with plots to this file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument(
        "--dir",
        type=Path,
        default=DISK,
        help="directory for the service's data during the benchmark (default %(default)s)",
    )
    options = parser.parse_args()
    rounds = options.rounds or (
        _QUICK_ROUNDS if options.quick else _AGAINST_ROUNDS if options.against is not None else _ROUNDS
    )
    if options.against is not None and not options.only:
        options.only = revisions.NAMES

    chosen = {case.name for case in CASES if not options.only or case.name.startswith(tuple(options.only))}
    if not chosen and memory.NAME not in options.only:
        parser.error(f"no case's name begins like that; the cases are: {', '.join(case.name for case in CASES)}")
    ratios = [ratio for ratio in RATIOS if ratio.case in chosen]
    if options.against is not None:
        ratios = [ratio for ratio in ratios if ratio.rival in revisions.RIVALS]
    ours = [case.name for case in CASES if case.name in chosen]
    chosen |= {ratio.rival for ratio in ratios}
    cases = [case for case in CASES if case.name in chosen]

    console = Console()
    if not console.is_terminal:
        console.width = 110
    progress = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        status = stack.enter_context(progress.status("starting"))
        if options.against is not None:
            try:
                era = stack.enter_context(revisions.installed(options.against))
            except revisions.UnknownRevision as problem:
                parser.error(str(problem))
            other = stack.enter_context(arena(options.dir, small=options.quick, era=era))
            cases, compared = revisions.with_other(cases, ours, other, options.against)
            ratios = [*compared, *ratios]
            other.wait_for_pool()
        place = stack.enter_context(arena(options.dir, small=options.quick))
        about = machine(place.health(), place.memory(), options.against)
        measured = measure(
            cases, place, rounds, options.quick, lambda done: status.update(f"round {done} of {rounds} done")
        )
        # What many sessions take is measured once, with all cases or by name.
        names = options.only or [memory.NAME]
        taken = memory.of_sessions(place, quick=options.quick) if memory.NAME in names else {}
    figures = summarize(cases, ratios, measured, about, taken)
    if options.page:
        options.page.parent.mkdir(parents=True, exist_ok=True)
        options.page.write_text(page(figures))
        progress.print(f"The page is {options.page}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    show(figures, console)


if __name__ == "__main__":
    main()
