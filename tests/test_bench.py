"""The benchmarks run, all of them. How fast anything is, no test says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

from bench.lists import CASES, RATIOS

ROOT = Path(__file__).resolve().parent.parent


def test_every_case_and_ratio_is_measured(tmp_path: Path) -> None:
    told = tmp_path / "bench.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", "--json", told, "--dir", tmp_path],
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
    assert all(case.name in done.stdout for case in CASES)
    assert list(tmp_path.iterdir()) == [told], "the benchmark left something behind"
