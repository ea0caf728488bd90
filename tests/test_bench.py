"""The benchmarks run, all of them. How fast anything is, no test says."""

from __future__ import annotations

import html
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench import plots
from bench.lists import CASES, RATIOS
from bench.neighbours import Neighbour, beside
from bench.page import page
from bench.processor import used_below
from tests.conftest import Server, eventually

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.soak  # a minute
def test_every_case_and_ratio_is_measured(tmp_path: Path) -> None:
    told, shown = tmp_path / "bench.json", tmp_path / "bench.html"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", "--json", told, "--page", shown, "--dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(told.read_text())

    assert list(found["cases"]) == [case.name for case in CASES]
    assert list(found["ratios"]) == [ratio.name for ratio in RATIOS]
    figures = [found["cases"][case.name][key] for case in CASES for key in ("p50", "p95", "min", "n")]
    figures += [found["ratios"][ratio.name][key] for ratio in RATIOS for key in ("median", "q1", "q3", "min", "max")]
    assert all(math.isfinite(figure) and figure > 0 for figure in figures)
    memory = found["memory"]
    assert memory.pop("processes of 100 idle sessions") <= 0
    assert all(figure > 0 for figure in memory.values())
    assert len(memory) == 2, "1,000 warm sessions are too many for a quick look"
    assert all(case.name in done.stdout for case in CASES)
    assert all(html.escape(name) in shown.read_text() for name in (*found["cases"], *found["ratios"]))
    assert sorted(tmp_path.iterdir()) == [shown, told], "the benchmark left something behind"


def test_a_neighbour_that_does_nothing_is_found_out(server: Server) -> None:
    """Else a figure would be that of a quiet machine."""
    port = int(server.url.rpartition(":")[2])
    silent = Neighbour("ends before it has said anything", "pass")
    with pytest.raises(RuntimeError, match="hasn't begun"), beside(port, silent, "silent"):
        pass
    refused = Neighbour("callers are refused", "", paths=("/nothing",), begin=b"HTTP/1.1 200 ")
    with pytest.raises(RuntimeError, match="could not call"), beside(port, refused, "refused"):
        pass
    ends = Neighbour("ends meanwhile", "pass", called=False)
    with (
        server.client() as client,
        pytest.raises(RuntimeError, match="has stopped"),
        beside(port, ends, "ends"),
    ):
        assert eventually(lambda: client.get("/api/sessions/ends/runs").json()["runs"][0]["status"] == "ok")


def figures() -> dict[str, Any]:
    """What a benchmark of two cases has found, in a place with a strange name."""
    times: dict[str, Any] = {"goal": None, "p50": 2.0, "p95": 3.0, "min": 1.0, "n": 2, "seconds": [[0.001, 0.003]]}
    spread = {"median": 1.0, "q1": 0.9, "q3": 1.1, "min": 0.8, "max": 1.2, "goal": 0.5}
    return {
        "machine": {
            "kernel": "6",
            "cpu": "<b>fast</b>",
            "cores": 2,
            "python": "3.13",
            "node": "24",
            "root": True,
            "isolation": "some",
            "load": 1.5,
            "service_mb": 100.0,
            "memory_gb": 4.0,
            "when": "today",
            "revision": "abc+",
            "against": "main",
            "missing": ["podman (it isn't installed)"],
        },
        "rounds": 1,
        "load": [1.5],
        "cases": {
            "python warm": {**times, "what": "a run", "cpu": 5.0},
            "python host": {**times, "what": "python3 -c", "cpu": None},
        },
        "ratios": {"python warm ÷ python host": spread},
        "memory": {"one more warm session, MB": 3.6},
    }


def test_the_page_has_every_figure_as_it_was_measured() -> None:
    made = page(figures())
    assert "<b>fast" not in made
    assert "&lt;b&gt;fast" in made
    raw = re.search("<pre>(.*)</pre>", made, re.DOTALL)
    assert raw
    assert json.loads(html.unescape(raw[1])) == figures()
    assert "one more warm session, MB</td><td>3.6" in made
    assert not re.search(r'(?:src|href)="(?!#)|url\((?!#)', made), "it needs something from elsewhere"


def test_plots_take_the_colours_of_the_page() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with `scripts/setup --bench`")
    found = figures()
    for drawn in (
        plots.calls("Calls", found["cases"], ["python host"]),
        plots.ratios("Ratios", found["ratios"]),
        plots.processor("Processor time", {"python warm": found["cases"]["python warm"]}, []),
        plots.load("Load", found["load"]),
    ):
        assert ElementTree.fromstring(drawn).tag.endswith("svg")
        assert "var(--ink)" in drawn
        assert not re.search("#01020", drawn)


def test_processor_time_is_that_of_a_process_and_of_all_below_it() -> None:
    before = used_below(os.getpid())
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])"])
    assert used_below(os.getpid()) - before >= 0.25


def test_an_unknown_revision_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--against", "no-such-revision", "--dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no-such-revision" in done.stderr
    assert list(tmp_path.iterdir()) == []
