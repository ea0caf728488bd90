"""Secrets of a run over HTTP: which are valid, and that programs get a placeholder for each."""

from __future__ import annotations

import re
from typing import Any

import httpx

from tests.api.answers import refused
from tests.client.command import era
from tests.conftest import MakeSession, Server, eventually
from tests.table import table

VALUE = "canary-2907"
CODE = "import os; print(os.environ['A'], os.environ['B'], os.environ['ERA_SESSION'])"
PLACEHOLDERS = re.compile(r"(era_secret_[0-9a-f]{32}) (era_secret_[0-9a-f]{32}) true\n")


def secrets(*names: str, value: Any = VALUE, hosts: Any = ("api.example.com", "*.example.org")) -> dict[str, Any]:
    """Secrets of these names, as the body of a run has them."""
    return {name: {"value": value, "hosts": list(hosts) if isinstance(hosts, tuple) else hosts} for name in names}


def test_every_call_that_runs_gives_placeholders(client: httpx.Client, session: MakeSession) -> None:
    """New placeholders each time; without network they are never replaced."""
    where = session(allowInternetAccess=False)
    body = {"code": CODE, "secrets": secrets("A", "B", "ERA_SESSION")}
    answers = [client.post(f"/api/sessions/{where}/run", json=body) for _ in range(2)]
    outputs = [answer.json()["stdout"] for answer in answers]
    execute = {**body, "language": "python", "allowInternetAccess": False}
    answers.append(client.post("/api/execute", json=execute))
    outputs.append(answers[-1].json()["stdout"])
    answers.append(client.post(f"/api/sessions/{where}/stream", json=body))
    outputs.append(answers[-1].text.split('"content": "')[1].split('"')[0].replace("\\n", "\n"))
    run_id = client.post(f"/api/sessions/{where}/run", json={**body, "background": True}).json()["run_id"]
    url = f"/api/sessions/{where}/runs/{run_id}"
    assert eventually(lambda: client.get(url).json()["status"] == "ok")
    answers.append(client.get(f"{url}/stdout"))
    outputs.append(answers[-1].text)
    placeholders = [
        one for text in outputs for match in [PLACEHOLDERS.fullmatch(text)] if match for one in match.groups()
    ]
    assert len(placeholders) == len(set(placeholders)) == 10, outputs
    answers.append(client.get(url))
    assert answers[-1].json()["enforced"]["network"] == "none"
    assert not any(VALUE in answer.text for answer in answers)


@table(
    "given",
    [
        secrets("A", value=""),
        secrets("A", value=f"{VALUE}\n"),
        secrets("A", value=f"{VALUE}\0"),
        secrets("A", value=VALUE * 1000),
        secrets("A", value=29071),
        secrets("A", value=[VALUE]),
        secrets("A", hosts=()),
        secrets("A", hosts=VALUE),
        secrets("A", hosts=(f"{VALUE}.example.com/path",)),
        secrets("A", hosts=("*",)),
        secrets("A", hosts=("203.0.113.10",)),
        secrets("A", hosts=("203.0.113.0/24",)),
        secrets("A", hosts=("api.example.com:443",)),
        secrets("A", hosts=tuple(f"h{n}.test" for n in range(33))),
        secrets("A B"),
        secrets(""),
        secrets("A" * 129),
        secrets(*(f"S{n}" for n in range(65))),
        secrets("E"),
        {"A": {"hosts": ["api.example.com"]}},
        {"A": {"value": VALUE}},
        {"A": VALUE},
        {"A": {**secrets("A")["A"], "plain_http": VALUE}},
        {"A": {**secrets("A")["A"], "more": VALUE}},
        [VALUE],
    ],
)
def test_invalid_secrets_are_refused_and_not_quoted(client: httpx.Client, session: MakeSession, given: Any) -> None:
    for path in (f"/api/sessions/{session()}/run", "/api/execute"):
        body = {"code": "", "env": {"E": "1"}, "secrets": given}
        answer = client.post(path, json=body if "sessions" in path else {**body, "language": "python"})
        refused(answer, 400)
        assert "canary" not in answer.text
        assert "29071" not in answer.text


def test_the_command_takes_the_value_from_its_own_environment(server: Server) -> None:
    words = ("run", "--language", "python", "--secret", "A=api.example.com,*.example.org", "--secret", "B=b.test", "-")
    outcome = era(server, *words, stdin=CODE, env={"A": VALUE, "B": "b"})
    assert PLACEHOLDERS.fullmatch(outcome.stdout), outcome
    assert "no variable B" in era(server, *words, stdin=CODE, env={"A": VALUE}).stderr
    outcome = era(server, "run", "-l", "py", "--secret", "A", "-", stdin=CODE, env={"A": VALUE})
    assert (outcome.returncode, "NAME=api.example.com" in outcome.stderr) == (2, True)
