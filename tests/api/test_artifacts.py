"""Artifacts: the pictures, documents and tables that a run wrote come back with its answer."""

from __future__ import annotations

import json

import httpx
import pytest

from era.wire.runs import RunAnswer
from tests.api.answers import RUN_KEYS, artifact_paths, checked, run_record
from tests.api.setups import make, settled
from tests.conftest import MakeSession, Run

CHART = """
svg = '<svg xmlns="http://www.w3.org/2000/svg"><circle r="9"/></svg>'
with open('chart.svg', 'w') as f:
    f.write(svg)
"""

SVG = {"type": "image/svg+xml", "path": "chart.svg", "size": 61}


def test_artifacts_come_with_the_answer_and_stand_on_the_record(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    code = CHART + "import os; os.mkdir('out'); open('out/Sums.CSV', 'w').write('a,b\\n1,2\\n'); open('x.txt', 'w')"
    outcome = checked(client.post(f"/api/sessions/{where}/run", json={"code": code}), RunAnswer, RUN_KEYS)
    expected = [SVG, {"type": "text/csv", "path": "out/Sums.CSV", "size": 8}]
    assert (outcome["artifacts"], outcome["artifacts_more"]) == (expected, 0)
    for each in expected:
        assert len(client.get(f"/api/sessions/{where}/files/{each['path']}").content) == each["size"]
    kept = run_record(client, where, outcome["run_id"])
    assert (kept["artifacts"], kept["artifacts_more"]) == (expected, 0)
    assert client.get(f"/api/sessions/{where}/runs").json()["runs"][0]["artifacts"] == expected


def test_artifacts_are_in_the_last_event_of_a_stream(client: httpx.Client, session: MakeSession) -> None:
    answer = client.post(f"/api/sessions/{session()}/stream", json={"code": CHART})
    done = json.loads(answer.text.split("data: ")[-1].partition("\n")[0])
    assert (done["type"], done["artifacts"], done["artifacts_more"]) == ("done", [SVG], 0)


def test_artifacts_are_what_this_run_wrote(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    client.put(f"/api/sessions/{where}/files/given.png", content=b"given")
    assert artifact_paths(run(where, CHART)) == ["chart.svg"]
    assert artifact_paths(run(where, "print('nothing written')")) == []
    assert artifact_paths(run(where, "open('note.txt', 'w').write('no picture')")) == []
    assert artifact_paths(run(where, CHART)) == ["chart.svg"], "the same content, but written again"
    assert artifact_paths(run(where, "import os; os.rename('chart.svg', 'renamed.svg')")) == ["renamed.svg"]
    assert artifact_paths(run(where, "import os; os.mkdir('d'); os.symlink('renamed.svg', 'd/link.svg')")) == []
    assert artifact_paths(run(where, "open('given.png', 'a').write('!'); open('d/new.pdf', 'w')")) == [
        "d/new.pdf",
        "given.png",
    ]
    assert artifact_paths(run(where, "import os; os.remove('given.png')")) == []
    client.post(f"/api/sessions/{where}/rollback", json={"version": 2})
    assert artifact_paths(run(where, CHART)) == ["chart.svg"]


def test_uncommitted_files_are_no_artifacts(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session(persistent=False)
    assert artifact_paths(run(where, CHART)) == []
    where = session()
    outcome = run(where, f"{CHART}\nexit(1)", atomic=True)
    assert (outcome["state"]["committed"], outcome["artifacts"]) == (False, [])
    outcome = run(where, f"{CHART}\nopen('.session_data.json', 'w').write('no json')")
    assert (outcome["state"]["committed"], outcome["artifacts"]) == (False, [])
    outcome = run(where, f"{CHART}\nexit(1)")
    assert (outcome["status"], outcome["artifacts"]) == ("failed", [SVG]), "a run that fails keeps its files"
    body = {"language": "python", "code": CHART}
    assert "artifacts" not in client.post("/api/execute", json=body).json()


def test_a_run_lists_at_most_100_artifacts(client: httpx.Client, session: MakeSession, run: Run) -> None:
    where = session()
    outcome = run(where, "for n in range(130): open(f'{n:03}.png', 'w').write('x' * n)")
    assert [each["path"] for each in outcome["artifacts"]] == [f"{n:03}.png" for n in range(100)]
    assert outcome["artifacts_more"] == run_record(client, where, outcome["run_id"])["artifacts_more"] == 30


PLOTS = """
import os
import matplotlib
import matplotlib.pyplot as plt
print(matplotlib.get_backend())
plt.plot([1, 2, 3])
plt.show()
first, second = plt.figure(), plt.figure()
first.gca().bar([1, 2], [3, 4])
second.gca().pie([1, 2])
plt.pause(0.01)
plt.show()
plt.show()
print(plt.get_fignums())
"""


@pytest.mark.soak
def test_shown_plots_become_artifacts(client: httpx.Client, run: Run) -> None:
    """With the real matplotlib, which is large and takes a while to install."""
    where = make(client, {"pip": ["matplotlib"]})
    settled(client, where)
    client.put(f"/api/sessions/{where}/files/figure-2.png", content=b"not this run's")
    outcome = run(where, PLOTS, timeout=60)
    assert (outcome["stdout"], outcome["stderr"]) == ("module://era_matplotlib\n[]\n", ""), outcome
    assert artifact_paths(outcome) == ["figure-1.png", "figure-3.png", "figure-4.png"]
    for path in artifact_paths(outcome):
        assert client.get(f"/api/sessions/{where}/files/{path}").content.startswith(b"\x89PNG")
    assert client.get(f"/api/sessions/{where}/files/figure-2.png").content == b"not this run's"
    outcome = run(where, "import matplotlib.pyplot as plt; f = plt.figure(); f.show()", timeout=60)
    assert (artifact_paths(outcome), outcome["stderr"]) == (["figure-5.png"], "")
    code = "import matplotlib, matplotlib.pyplot as plt; plt.figure(); print(matplotlib.get_backend())"
    assert run(where, code, env={"MPLBACKEND": "svg"}, timeout=60)["stdout"] == "svg\n"
    assert run(where, f"import matplotlib; matplotlib.use('pdf'); {code}", timeout=60)["stdout"] == "pdf\n"
