"""The figures of a benchmark, as plain values and as tables."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import gateway, podman, postgres, revisions
from bench.cases import Case, Ratio
from bench.measure import Measured, spread, summary
from era.drivers import guest
from era.languages.node import NODE


def machine(health: Mapping[str, Any], memory: int, against: str | None = None) -> dict[str, Any]:
    """Describe the machine, and what is measured. `health` is the service's answer to GET /health, `memory` its
    resident bytes, `against` the revision that it is compared with, if it is.

    The isolation is what the service says is in force.
    """
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    node = subprocess.run(
        [guest.MOUNTS[NODE] / "bin" / "node", "--version"], capture_output=True, text=True, check=True
    )
    return {
        "kernel": platform.release(),
        "cpu": next((line.partition(":")[2].strip() for line in cpus if line.startswith("model name")), "unknown"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "node": node.stdout.strip().removeprefix("v"),
        "root": os.geteuid() == 0,
        "isolation": health["isolation"]["summary"],
        "load": os.getloadavg()[0],
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "revision": revisions.described(),
        "against": against,
        "missing": missing(),
        "service_mb": memory / (1 << 20),
    }


def missing() -> list[str]:
    """Rivals that can't be measured here, each with why."""
    found = [] if shutil.which("runsc") else ["gVisor (no runsc on the PATH)"]
    runtime, problem = podman.usable()
    if runtime is None:
        found.append(f"podman ({problem})")
    if not postgres.IS_THERE:
        found.append("a million sessions (there is no PostgreSQL)")
    return found if gateway.CASES else [*found, "Jupyter Kernel Gateway (`scripts/setup --bench` installs it)"]


def summarize(
    cases: Sequence[Case],
    ratios: Sequence[Ratio],
    measured: Measured,
    about: Mapping[str, Any],
    memory: Mapping[str, float],
) -> dict[str, Any]:
    """All figures as JSON values. Times are in milliseconds, but for `seconds`, which are those of each call by
    round. `memory` is what memory.py has measured."""
    times = measured.times
    return {
        "machine": dict(about),
        "rounds": len(next(iter(times.values()), [])),
        "load": list(measured.load),
        "cases": {
            case.name: {
                "what": case.what,
                "goal": case.goal,
                **summary(times[case.name]),
                "cpu": 1000 * statistics.fmean(measured.processor[case.name]) if case.processor else None,
                "seconds": times[case.name],
            }
            for case in cases
        },
        "ratios": {ratio.name: spread(ratio, measured) for ratio in ratios},
        "memory": dict(memory),
    }


def show(figures: Mapping[str, Any], console: Console) -> None:
    """Print what `summarize` returned."""
    about = figures["machine"]
    who = "root" if about["root"] else "an ordinary user"
    console.print(
        f"kernel {about['kernel']}, {about['cpu']}, {about['cores']} cores, Python {about['python']}, "
        f"Node {about['node']}, as {who}, load {about['load']:.1f} → {os.getloadavg()[0]:.1f}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"isolation: {about['isolation']}", highlight=False, soft_wrap=True)
    console.print(f"the service at rest: {about['service_mb']:.0f} MB", highlight=False)

    for what, figure in figures["memory"].items():
        console.print(f"{what}: {figure:.1f}", highlight=False)

    times = _table("times, ms", "p50", "p95", "min", "n", "cpu", "goal", "what")
    for name, case in figures["cases"].items():
        milliseconds = [f"{case[key]:.2f}" for key in ("p50", "p95", "min")]
        used = "" if case["cpu"] is None else f"{case['cpu']:.2f}"
        times.add_row(name, *milliseconds, str(case["n"]), used, _goal(case), case["what"])
    console.print(times)

    if figures["ratios"]:
        ratios = _table(f"ratios of {figures['rounds']} rounds", "median", "quartiles", "min – max", "goal")
        for name, ratio in figures["ratios"].items():
            ratios.add_row(
                name,
                f"{ratio['median']:.2f}",
                f"{ratio['q1']:.2f} – {ratio['q3']:.2f}",
                f"{ratio['min']:.2f} – {ratio['max']:.2f}",
                _goal(ratio),
            )
        console.print(ratios)


def _goal(figures: Mapping[str, Any]) -> str:
    return "" if figures["goal"] is None else f"≤ {figures['goal']:g}"


def _table(title: str, *columns: str) -> Table:
    table = Table("", title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column == "what" else "right", no_wrap=column != "what")
    return table
