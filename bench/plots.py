"""The plots of a benchmark's page, drawn by matplotlib as SVG that takes the page's colours, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

_INK, _FAINT, _OURS, _RIVAL, _GOAL = "#010203", "#010204", "#010205", "#010206", "#010207"
_VARIABLES = {_INK: "--ink", _FAINT: "--faint", _OURS: "--ours", _RIVAL: "--rival", _GOAL: "--goal"}
"""Colours that matplotlib is given, and the page's variables that take their place."""

_ROW = 0.24
_WIDTH = 9.5


class NoPlots(Exception):
    """matplotlib isn't installed."""


def calls(title: str, cases: Mapping[str, Mapping[str, Any]], rivals: Sequence[str]) -> str:
    """Every call of some cases as a point, on a logarithmic scale of milliseconds, with the median as a line. Raises
    NoPlots."""
    axes, figure = _axes(title, list(cases))
    for row, (name, case) in enumerate(cases.items()):
        points = [1000 * seconds for each_round in case["seconds"] for seconds in each_round]
        colour = _RIVAL if name in rivals else _OURS
        spread = [row + 0.3 * ((number * 0.618) % 1 - 0.5) for number in range(len(points))]
        axes.plot(points, spread, ".", color=colour, markersize=4, alpha=0.5, markeredgewidth=0)
        axes.plot([case["p50"]] * 2, [row - 0.35, row + 0.35], "-", color=colour, linewidth=2.5)
    axes.set_xscale("log")
    axes.set_xlabel("ms a call")
    return _svg(figure)


def ratios(title: str, spreads: Mapping[str, Mapping[str, Any]]) -> str:
    """The quartiles of ratios with their medians, and their goals. Raises NoPlots."""
    axes, figure = _axes(title, list(spreads))
    for row, ratio in enumerate(spreads.values()):
        axes.plot([ratio["q1"], ratio["q3"]], [row, row], "-", color=_OURS, linewidth=4, alpha=0.45)
        axes.plot([ratio["median"]], [row], "o", color=_OURS, markersize=5)
        if ratio["goal"] is not None:
            axes.plot([ratio["goal"]] * 2, [row - 0.35, row + 0.35], "-", color=_GOAL, linewidth=2)
    axes.axvline(1, color=_FAINT, linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("÷ rival: left of 1, ERA is faster")
    return _svg(figure)


def processor(title: str, cases: Mapping[str, Mapping[str, Any]], rivals: Sequence[str]) -> str:
    """Processor time of a run, its mean. Raises NoPlots."""
    axes, figure = _axes(title, list(cases))
    for row, (name, case) in enumerate(cases.items()):
        axes.barh([row], [case["cpu"]], color=_RIVAL if name in rivals else _OURS, height=0.6)
    axes.set_xlabel("ms of processor time a run")
    return _svg(figure)


def load(title: str, loads: Sequence[float]) -> str:
    """The machine's load, round by round. Raises NoPlots."""
    axes, figure = _axes(title, ["load"] * 6, labels=False)
    axes.invert_yaxis()
    axes.plot(range(1, len(loads) + 1), loads, "o-", color=_OURS, markersize=3)
    axes.set_ylim(0, max([*loads, 1]) * 1.1)
    axes.set_xlabel("round")
    axes.set_ylabel("mean of a minute")
    return _svg(figure)


def _axes(title: str, names: Sequence[str], *, labels: bool = True) -> tuple[Any, Any]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise NoPlots from None
    settings = {
        "svg.fonttype": "none",  # text stays text, in the page's font
        "svg.hashsalt": "era",  # the same figures make the same file
        "font.size": 9,
        "font.family": "sans-serif",
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
        "axes.facecolor": "none",
        "grid.color": _FAINT,
    }
    matplotlib.rcParams.update(settings)
    figure = Figure(figsize=(_WIDTH, 1 + _ROW * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.grid(axis="x", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if labels:
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
    return axes, figure


def _svg(figure: Any) -> str:
    """A figure as an element for a page."""
    content = io.StringIO()
    figure.savefig(content, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = content.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', text, count=1)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text
