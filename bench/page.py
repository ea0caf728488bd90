"""The page of a benchmark: plots, tables, the machine, and all raw figures, in one file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bench import plots

_GROUPS = {
    "Python": ("python", "eight clients", "two loops", "create and run", "gateway"),
    "Node, TypeScript, Deno, Go": ("node", "typescript", "deno", "go "),
    "gVisor": ("gvisor",),
    "Many sessions": (
        "creates at once",
        "warm among",
        "in turn",
        "wake",
        "quiet",
        "crowded",
        "beside",
        "health beside",
    ),
    "The service": ("",),
}
"""Titles of plots, and how the names of their cases begin. A case is in the first that fits."""

_RIVALS = ("host", "bwrap", "runsc", "direct", "by hand", "tool", "floor", "two loops", "gateway", "python file", "@")
"""What names of cases have in them that are measured without this ERA."""

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2024; --faint: #d9dde1; --ours: #0b6bcb; --rival: #8a6d3b;
  --goal: #c4320a; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e4e7ea; --faint: #33393f; --ours: #5aa9ff;
  --rival: #c9a86a; --goal: #ff8a65; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
svg { display: block; width: 100%; height: auto; margin: 1.5rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
div { overflow-x: auto; }
th, td { padding: 0.15rem 0.7rem 0.15rem 0; text-align: right; border-bottom: 1px solid var(--faint); }
th:first-child, td:first-child, .last :is(th, td):last-child { text-align: left; }
.ours { color: var(--ours); } .rival { color: var(--rival); } .goal { color: var(--goal); }
pre { overflow: auto; max-height: 30rem; font-size: 12px; }
"""


def page(figures: Mapping[str, Any]) -> str:
    """The page about what `report.summarize` returned. Without matplotlib it has no plots, and says so."""
    about, cases = figures["machine"], figures["cases"]
    loads = figures["load"]
    parts = [
        "<h1>ERA, measured</h1>",
        f"<p>{escape(about['when'])}, revision {escape(about['revision'])}"
        + (f", beside {escape(about['against'])}" if about["against"] else "")
        + f". {figures['rounds']} rounds.</p>",
        f"<p>{escape(about['cpu'])}, {about['cores']} processors, {about['memory_gb']:.0f} GB, "
        f"kernel {escape(about['kernel'])}, Python {escape(about['python'])}, Node {escape(about['node'])}, as "
        f"{'root' if about['root'] else 'an ordinary user'}. Isolation: {escape(about['isolation'])}.</p>",
        f"<p>Load at the start {about['load']:.1f}, at the end {loads[-1]:.1f}: what else ran counts in every figure, "
        f"and least in ratios, whose two sides were measured side by side.</p>",
        *(f"<p>Not measured: {escape(what)}.</p>" for what in about["missing"]),
        '<p><span class="ours">■ this ERA</span> <span class="rival">■ others</span> '
        '<span class="goal">| goal</span></p>',
        *_plots(figures),
        "<h2>Ratios</h2>",
        _table(
            ("", "median", "q1", "q3", "min", "max", "goal"),
            [
                (name, *(f"{ratio[key]:.2f}" for key in ("median", "q1", "q3", "min", "max")), _goal(ratio))
                for name, ratio in figures["ratios"].items()
            ],
        ),
        "<h2>Times, ms</h2>",
        _table(
            ("", "p50", "p95", "min", "n", "processor", "goal", "what"),
            [
                (
                    name,
                    *(f"{case[key]:.2f}" for key in ("p50", "p95", "min")),
                    str(case["n"]),
                    "" if case["cpu"] is None else f"{case['cpu']:.2f}",
                    _goal(case),
                    case["what"],
                )
                for name, case in cases.items()
            ],
        ),
        *_memory(figures["memory"]),
        "<details><summary>All figures, each call in seconds</summary>",
        f"<pre>{escape(json.dumps(figures, indent=1, ensure_ascii=False))}</pre></details>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>ERA, measured</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _memory(figures: Mapping[str, float]) -> list[str]:
    rows = [(what, f"{figure:.1f}") for what, figure in figures.items()]
    return ["<h2>Memory and capacity</h2>", _table(("", ""), rows)] if rows else []


def _plots(figures: Mapping[str, Any]) -> list[str]:
    cases = figures["cases"]
    rivals = [name for name in cases if any(part in name for part in _RIVALS)]
    used = {name: case for name, case in cases.items() if case["cpu"] is not None}
    try:
        drawn = [plots.ratios("Ratios: medians, quartiles and goals", figures["ratios"])] if figures["ratios"] else []
        for title, names in _groups(list(cases)).items():
            drawn.append(plots.calls(title, {name: cases[name] for name in names}, rivals))
        if used:
            drawn.append(plots.processor("Processor time", used, rivals))
        return [*drawn, plots.load("Load of the machine", figures["load"])]
    except plots.NoPlots:
        return ["<p>There are no plots, since matplotlib isn't installed: <code>scripts/setup --bench</code>.</p>"]


def _groups(names: Sequence[str]) -> dict[str, list[str]]:
    """The cases of each plot, by its title."""
    groups: dict[str, list[str]] = {}
    for name in names:
        title = next(title for title, begins in _GROUPS.items() if name.startswith(begins))
        groups.setdefault(title, []).append(name)
    return groups


def _goal(figures: Mapping[str, Any]) -> str:
    return "" if figures["goal"] is None else f"≤ {figures['goal']:g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(kind: str, values: Sequence[str]) -> str:
        return "".join(f"<{kind}>{escape(value)}</{kind}>" for value in values)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    last = ' class="last"' if head[-1] == "what" else ""
    return f"<div><table{last}><tr>{cells('th', head)}</tr>{body}</table></div>"
