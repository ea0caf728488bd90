"""Models of what comes from outside: however much is wrong, few errors are made."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from era.common.few_errors import MOST_ERRORS, TOO_MANY, FewErrors
from era.core.secrets import MAX_SECRETS
from era.mcp.arguments import OnceInLanguage
from era.wire.api_keys import KeyBody
from era.wire.base import EgressBody
from era.wire.runs import ExecuteBody, RunBody, SecretBody
from era.wire.sessions import CreateSession
from era.wire.setup import SetupBody
from era.wire.storage import SqlBody
from era.wire.webhooks import WebhookBody

MANY = [1] * 5000
NAMED = {f"n{number}": 1 for number in range(5000)}
OBJECTS: list[Any] = [{} for _ in range(5000)]


@pytest.mark.parametrize(
    ("model", "value"),
    [
        (SqlBody, {"sql": "", "params": OBJECTS}),
        (SqlBody, {"sql": "", "params": [["a"] * 5000]}),
        (SqlBody, {"sql": "", "params": {name: {} for name in NAMED}}),
        (SqlBody, {"sql": "", "params": {name: ["a"] for name in NAMED}}),
        (SqlBody, {"sql": "", **NAMED}),
        (RunBody, {"env": NAMED}),
        (RunBody, {"args": MANY, "command": MANY}),
        (RunBody, {"secrets": NAMED}),
        (RunBody, {"secrets": {f"s{number}": {"hosts": MANY} for number in range(MAX_SECRETS)}}),
        (ExecuteBody, {"language": "python", "files": NAMED}),
        (SecretBody, {"value": "a", "hosts": MANY}),
        (SetupBody, {"pip": MANY, "npm": MANY, "go": MANY, "commands": MANY, "envs": NAMED}),
        (CreateSession, {"language": "python", "setup": NAMED, "limits": NAMED, "service": MANY}),
        (EgressBody, {"allow": ["a" * 301] * 5000}),
        (KeyBody, {"owner": "a", "scopes": ["a"] * 5000, "quotas": NAMED}),
        (WebhookBody, {"url": "https://example.com", "events": ["a"] * 5000}),
        (OnceInLanguage, {"language": "python", "code": "", "env": NAMED, "files": NAMED, "args": MANY, **NAMED}),
    ],
)
def test_whatever_is_wrong_few_errors_are_made(model: type[BaseModel], value: Any) -> None:
    """All errors of one model were made, and told: 25,000 for 5,000 objects in place of values."""
    with pytest.raises(ValidationError) as raised:
        model.model_validate(value)
    assert raised.value.error_count() <= MOST_ERRORS


def test_what_still_makes_many_errors_makes_one() -> None:
    class Numbers(FewErrors):
        numbers: list[int]

    for count, type_ in ((MOST_ERRORS, "int_parsing"), (MOST_ERRORS + 1, TOO_MANY)):
        with pytest.raises(ValidationError) as raised:
            Numbers.model_validate({"numbers": ["a"] * count})
        assert {each["type"] for each in raised.value.errors()} == {type_}


def test_what_is_right_is_taken_whole() -> None:
    named = dict.fromkeys(NAMED, "a")
    assert RunBody.model_validate({"env": named}).env == named
    params = {name: [1, 2] for name in NAMED}
    assert SqlBody.model_validate({"sql": "", "params": params}).params == params
    assert SqlBody.model_validate({"sql": "", "params": [1, 1.5, "a", None, True, [0]]}).params is not None


@pytest.mark.parametrize(
    "params", [[[1]] * 32_767, {f"n{number}": 1 for number in range(32_767)}], ids=["list", "object"]
)
def test_more_params_than_a_statement_may_have_are_refused_before_they_are_looked_at(params: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        SqlBody.model_validate({"sql": "", "params": params})
    assert [error["type"] for error in caught.value.errors()] == ["too_long"]


def test_few_secrets_are_validated_when_all_have_unknown_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    validated = list[Any]()
    few = SecretBody._without_most_unknown

    def noting(value: Any) -> Any:
        validated.append(value)
        return few(value)

    monkeypatch.setattr(SecretBody, "_without_most_unknown", noting)
    secret = {"value": "a", "hosts": ["a.example"]}
    right = RunBody.model_validate({"secrets": {f"S{number}": secret for number in range(MAX_SECRETS)}})
    assert len(right.secrets) == len(validated) == MAX_SECRETS
    validated.clear()
    with pytest.raises(ValidationError) as caught:
        RunBody.model_validate({"secrets": {f"S{number}": {**secret, "x": 1} for number in range(MAX_SECRETS)}})
    assert {error["type"] for error in caught.value.errors()} == {"extra_forbidden"}
    assert len(validated) == 10
