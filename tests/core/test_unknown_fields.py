"""Bodies of JSON with more unknown fields than are looked at: the rest of them isn't parsed."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Response
from pydantic import ValidationError

from era.api.context import StrictRoute
from era.core import jsontext
from era.core.jsontext import JsonProblem
from era.core.secrets import MAX_SECRETS
from era.errors import BadRequest
from era.wire.runs import RunBody, SecretBody
from era.wire.sessions import CreateSession

TEXTS = [
    '{"a": 1, "b": [1, {"c": "}"}], "a": 2}',
    ' \n{ "a" :\t1 , "b" : null }\r\n',
    '{"a": "\\u00e9\\"", "é": 1.5e3}',
    "{}",
    " { } ",
    "[1]",
    '"text"',
    "null",
    "5",
    "{",
    '{"a"',
    '{"a":',
    '{"a": 1',
    '{"a": 1,',
    '{"a": 1,}',
    '{"a": 1} x',
    '{"a": 1}}',
    '{"a" 1}',
    '{"a": 1 "b": 2}',
    "{a: 1}",
    "{1: 1}",
    "{,}",
    '{"a": NaN}',
    '{"a": 1e999}',
    '{"a": "\\ud800"}',
    '{"\\ud800": 1}',
    '{"a": ' + "1" * 5000 + "}",
    '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
]


def outcome(text: str, *known: set[str]) -> object:
    try:
        return jsontext.loads(text.encode(), *known)
    except JsonProblem as error:
        return type(error), str(error)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("known", [set(), {"a"}], ids=["none", "one"])
def test_text_is_read_the_same_when_fields_are_known(text: str, known: set[str]) -> None:
    assert outcome(text, known) == outcome(text)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The integers that are parsed."""
    digits, integers = list[str](), jsontext.integers

    def counting() -> Any:
        read = integers()

        def note(text: str) -> int:
            digits.append(text)
            return read(text)

        return note

    monkeypatch.setattr(jsontext, "integers", counting)
    return digits


@pytest.mark.parametrize("headers", [{"Content-Type": "application/json"}, {"Content-Type": "text/plain"}])
async def test_body_is_parsed_up_to_its_hundredth_unknown_field(headers: dict[str, str], parsed: list[str]) -> None:
    """5,000 took 2 ms of the event loop."""
    router = APIRouter(route_class=StrictRoute)

    @router.post("/api/sessions")
    async def take(body: CreateSession) -> Response:
        raise AssertionError(body)

    application = FastAPI()
    application.include_router(router)
    body = json.dumps({"language": "python", **{f"unknown{number}": number for number in range(5000)}})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://era.example") as client:
        with pytest.raises(BadRequest, match="'unknown0' is not a field of this call"):
            await client.post("/api/sessions", content=body, headers=headers)
    assert len(parsed) == 101


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


def test_repeated_known_fields_are_left_to_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of them would keep the event loop ten times as long as it takes to decode them."""
    steps = []
    raw_decode = json.JSONDecoder.raw_decode

    def counting(self: json.JSONDecoder, text: str, idx: int = 0) -> tuple[Any, int]:
        steps.append(idx)
        return raw_decode(self, text, idx)

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", counting)
    text = "{" + '"code": 1, ' * 5000 + '"code": "last"}'
    assert jsontext.loads(text.encode(), {"code"}) == {"code": "last"}
    assert len(steps) < 1000
