"""The figures of a benchmark, as plain values and as tables."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.cases import Case, Ratio
from bench.measure import Times, spread, summary
from era.drivers import guest
from era.languages.node import NODE


def machine(health: Mapping[str, Any], memory: int) -> dict[str, Any]:
    """Describe the machine. `health` is the service's answer to GET /health, `memory` its resident bytes.

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
        "service_mb": memory / (1 << 20),
    }


def summarize(cases: Sequence[Case], ratios: Sequence[Ratio], times: Times, about: Mapping[str, Any]) -> dict[str, Any]:
    """All figures as JSON values; times are in milliseconds."""
    return {
        "machine": dict(about),
        "rounds": len(next(iter(times.values()))),
        "cases": {case.name: {"what": case.what, "goal": case.goal, **summary(times[case.name])} for case in cases},
        "ratios": {ratio.name: spread(ratio, times) for ratio in ratios},
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

    times = _table("times, ms", "p50", "p95", "min", "n", "goal", "what")
    for name, case in figures["cases"].items():
        milliseconds = [f"{case[key]:.2f}" for key in ("p50", "p95", "min")]
        times.add_row(name, *milliseconds, str(case["n"]), _goal(case), case["what"])
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
