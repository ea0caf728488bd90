"""Health, metrics and the description of the API (OpenAPI)."""

from __future__ import annotations

import json
import re

import httpx
import jsonschema_rs
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import MakeSession, Run, metrics_now


def test_health_describes_the_service(client: httpx.Client) -> None:
    body = client.get("/health").json()
    assert body["status"] == "ok"
    assert body["languages"] == ["deno", "go", "node", "python", "shell", "typescript"]
    assert body["isolation"]["driver"] == "bubblewrap"
    assert len(body["isolation"]["summary"]) > 20


def test_the_operator_sees_limits_and_findings(client: httpx.Client) -> None:
    body = client.get("/api/server").json()
    assert body["at_a_time"]["runs"] >= 2
    assert body["at_a_time"]["sandboxes"] >= 1
    assert {"ERA_MEMORY_MB", "ERA_MAX_WARM", "ERA_MAX_TIMEOUT"} <= {each["name"] for each in body["limits"]}
    assert {"python", "bubblewrap"} <= {each["about"] for each in body["findings"] if each["there"]}
    assert all(each["there"] or each["remedy"] for each in body["findings"])


def samples(client: httpx.Client) -> dict[tuple[str, tuple[str, ...]], float]:
    """The samples of /metrics, by name and label values."""
    text = metrics_now(client)
    assert client.get("/metrics").headers["content-type"].startswith("text/plain")
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_sessions_and_runs(
    client: httpx.Client, at_home: httpx.Client, session: MakeSession, run: Run
) -> None:
    def told() -> dict[tuple[str, tuple[str, ...]], float]:
        """What the sessions' home tells, and what hosts have together, which one of them counts."""
        return samples(client) | samples(at_home)

    assert told()["era_sessions", ()] == 0
    where = session()
    before = told()
    run(where, "1/0")
    after = told()
    assert after["era_sessions", ()] == 1
    assert after["era_sandboxes", ("live",)] == 1
    key = ("era_runs", ("failed",))
    assert after[key] - before.get(key, 0) == 1


def test_the_description_of_the_api_is_valid_and_whole(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert re.fullmatch(r"3\.1\.\d+", document["openapi"])
    for name, schema in document["components"]["schemas"].items():
        jsonschema_rs.Draft202012Validator({**schema, "components": document["components"]}), name
    references = re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', json.dumps(document))
    assert set(references) == set(document["components"]["schemas"])
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            statuses = operation["responses"].keys()
            assert "422" not in statuses, (method, path)
            assert {"200", "201"} & statuses, (method, path)
            if path.startswith("/api/"):
                assert {"400", "401", "403"} <= statuses, (method, path)
                assert operation["summary"]
                assert operation["description"]
    for expected in ("/api/sessions", "/api/sessions/{session_id}", "/api/sessions/{session_id}/run", "/api/execute"):
        assert expected in document["paths"]


def test_docs_are_served(client: httpx.Client) -> None:
    answer = client.get("/docs")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
