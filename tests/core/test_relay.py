"""The relay without a server. Whatever a program prints becomes a response that HTTP can carry, or an error; and each
rule for headers, taken out, lets through what it keeps back."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from era.core import jsontext
from era.core.execution.run_messages import Collected, RunResult
from era.core.execution.spooled_output import SpooledOutput
from era.core.models import StateOutcome
from era.core.public import headers, relay
from era.core.public.relay import Call, Reply
from era.errors import RelayFailed
from tests.weakened import FirstCome

PATH = "/proxy/s/"
PLAIN = st.text(max_size=12) | st.sampled_from(["text/html", "a: b", "x\r\ny: z", "sandbox; x, y", "a=1; Path=/"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.floats(allow_nan=False) | PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["Set-Cookie", "Content-Security-Policy", "content-type", "Content-Length", "X-A"]) | PLAIN
ANSWERS = VALUES | st.fixed_dictionaries(
    {},
    optional={
        "status": st.integers(150, 650) | VALUES,
        "headers": st.dictionaries(NAMES, PLAIN | st.lists(PLAIN, max_size=3) | VALUES, max_size=4) | VALUES,
        "contentType": PLAIN | VALUES,
        "body": VALUES,
    },
)


async def ended(printed: bytes, **fields: Any) -> Collected:
    """A run that printed this."""
    given = {"status": "ok", "exit_code": 0, "stdout_truncated": False, **fields}
    result = RunResult(
        run_id="run_1",
        session_id="s",
        duration=0.1,
        data={},
        stderr_truncated=False,
        state=StateOutcome(1, committed=True),
        **given,
    )
    stdout, stderr = SpooledOutput(), SpooledOutput()
    await stdout.append(printed)
    await stderr.append(b"secret")
    return Collected(result, stdout, stderr)


def replied(printed: bytes, **fields: Any) -> Reply:
    async def reply() -> Reply:
        return await relay.reply(await ended(printed, **fields), headers.Place(PATH, None), "own")

    return asyncio.run(reply())


def answered(**answer: Any) -> list[tuple[str, str]]:
    return replied(json.dumps(answer).encode()).headers


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(ANSWERS)
def test_every_answer_can_be_sent(answer: Any) -> None:
    try:
        reply = replied(json.dumps(answer).encode())
    except RelayFailed:
        return
    assert 200 <= reply.status <= 599
    assert reply.headers[-2] == ("content-security-policy", headers.POLICY)
    assert [name for name, _ in reply.headers].count("content-type") == 1
    for name, value in reply.headers:
        assert re.fullmatch(r"[!-9;-~]+", name)
        assert re.fullmatch(r"[\t -~]*", value)
        assert name != "content-length"
        if name == "set-cookie":
            assert value.startswith(headers.COOKIE_PREFIX)
            assert value.endswith(f"; Path={PATH}")
        if name == "content-security-policy" and value != headers.POLICY:
            assert not re.search(r"(^|[;,])\s*sandbox", value)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40))
def test_every_output_is_an_answer(printed: bytes) -> None:
    try:
        body = replied(printed).body
        assert isinstance(body, bytes)
        assert body.strip() in (printed.strip(), b"")
    except RelayFailed:
        assert printed.strip().startswith(b"{")


HEADERS = [(b"authorization", b"Bearer key"), (b"cookie", b"other=key"), (b"connection", b"key"), (b"x-own", b"1")]


def headers_seen_by_program(key: bytes | None) -> str:
    return relay.environment(Call("GET", b"/", b"", HEADERS, b""), key=key)["ERA_HTTP_HEADERS"]


def test_what_keeps_headers_from_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(headers_seen_by_program(b"key")) == {"x-own": "1"}
    assert json.loads(headers_seen_by_program(None)) == {"x-own": "1", "authorization": "Bearer key"}
    assert json.loads(headers_seen_by_program(b"other")) == json.loads(
        headers_seen_by_program(None)
    )  # it is the program's own affair
    monkeypatch.setattr(headers, "COOKIE_PREFIX", "")
    assert json.loads(headers_seen_by_program(b"another"))["cookie"] == "other=key"
    assert "cookie" not in json.loads(headers_seen_by_program(b"key"))  # a cookie with an API key is dropped anyway
    monkeypatch.setattr(headers, "_HOP_BY_HOP", frozenset())
    assert json.loads(headers_seen_by_program(b"key"))["connection"] == "key"


def test_what_keeps_headers_of_programs_back(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {
        "Clear-Site-Data": '"*"',
        "Content-Length": 3,
        "X-Accel-Redirect": "/etc/passwd",
        "X-Sendfile2": "/etc/passwd 0-",
        "X-LiteSpeed-Location": "/etc/passwd",
        "X-Reproxy-URL": "http://169.254.169.254/",
    }
    ours = {"content-type", "content-security-policy", "x-content-type-options"}
    assert {name for name, _ in answered(headers=wanted)} == ours
    monkeypatch.setattr(headers, "_NOT_FOR_GUESTS", frozenset())
    monkeypatch.setattr(headers, "_NOT_FOR_GUESTS_PREFIXES", ())
    assert {name for name, _ in answered(headers=wanted)} == ours | {name.lower() for name in wanted}


MANY_POLICIES = {"one header": "a," * 499_000, "32 KiB": "a," * 2_000, "in lines": ["a"] * 2_000}


@pytest.mark.parametrize("kind", MANY_POLICIES)
@pytest.mark.parametrize("is_sound", [True, False], ids=["", "weakened"])
def test_policies_count_among_the_headers(kind: str, is_sound: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each becomes a line of its own, which all others would wait for while half a million are written."""
    if not is_sound:
        monkeypatch.setattr(headers, "_MAX_ANSWER_BYTES", 1 << 40)
        assert len(answered(headers={"Content-Security-Policy": MANY_POLICIES[kind]})) >= 2_000
        return
    with pytest.raises(RelayFailed, match="32 KiB of headers"):
        answered(headers={"Content-Security-Policy": MANY_POLICIES[kind]})


def test_long_policies_are_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a live server are looked at by the event loop."""
    described = [("content-security-policy", "a," * 32_000)]
    monkeypatch.setattr(headers, "_without_sandbox", lambda _: pytest.fail("read"))
    with pytest.raises(RelayFailed, match="32 KiB of headers"):
        headers.of_answer(described, headers.Place(PATH, None))


def test_a_hundred_policies_are_sent() -> None:
    sent = answered(headers={"Content-Security-Policy": "sandbox; default-src 'self', " * 100})
    assert [value for name, value in sent if name == "content-security-policy"] == [
        *["default-src 'self'"] * 100,
        headers.POLICY,
    ]


def test_a_site_has_one_content_type() -> None:
    described = [("content-type", "text/plain"), ("x-a", "1"), ("content-type", "multipart/mixed")]
    assert headers.of_answer(described, headers.site("s")) == [("x-a", "1"), ("content-type", "multipart/mixed")]


def test_what_keeps_lines_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RelayFailed):
        answered(headers={"X-A": "1\r\nX-B: 2"})
    monkeypatch.setattr(headers, "_CONTROL", re.compile("(?!)"))
    assert ("x-a", "1\r\nX-B: 2") in answered(headers={"X-A": "1\r\nX-B: 2"})


@pytest.mark.parametrize("size", [1_000, 100_000, 2_000_000])
def test_a_large_answer_is_read_in_a_thread(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that others go on meanwhile."""
    where, loads = [], jsontext.loads

    def noting(text: bytes) -> Any:
        where.append(threading.current_thread())
        return loads(text)

    monkeypatch.setattr(jsontext, "loads", noting)
    replied(json.dumps({"body": ["a" * size]}).encode())
    (thread,) = where
    assert (thread is threading.main_thread()) == (size == 1_000)


@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
async def test_large_answers_are_read_by_turns_of_owners(weakened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    async def begin(_: SpooledOutput) -> bytes:
        return b"{"

    async def noting(_result: RunResult, _stdout: bytes, _place: headers.Place, owner: str) -> Reply:
        turns.append(owner)
        return Reply(200, [], b"")

    monkeypatch.setattr(relay, "_begin_of", begin)
    monkeypatch.setattr(relay, "_described_by", noting)
    if weakened:
        monkeypatch.setattr(relay, "_one_large", FirstCome(1))
    runs = [await ended(b"{" * (relay._LARGE + 1)) for _ in range(5)]
    place = headers.Place(PATH, None)
    replies = await asyncio.gather(*(relay.reply(*asked) for asked in zip(runs, [place] * 5, "aaaab", strict=True)))
    assert turns == list("aaaab" if weakened else "aabaa")
    for run, reply in zip(runs, replies, strict=True):
        run.close()
        assert isinstance(reply.body, SpooledOutput)
        reply.body.close()


def test_a_large_body_is_written_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python may switch threads at each. Its encoder in C is one step, however large the body, and all others wait."""
    steps, compact = 0, jsontext.compact

    def step(*_: object) -> None:
        nonlocal steps
        steps += 1

    def noting(*args: Any, **options: Any) -> str:
        sys.setprofile(step)
        try:
            return compact(*args, **options)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(jsontext, "compact", noting)
    answered(body=[0.5] * 20_000)
    assert steps > 20_000


def test_a_large_body_is_not_nested_too_deeply() -> None:
    deep: Any = "a" * 100_000
    for _ in range(100):
        deep = [deep]
    with pytest.raises(RelayFailed, match="deeper than 64"):
        answered(body=deep)


def test_paths_and_queries_are_escaped() -> None:
    variables = relay.environment(Call("GET", b'/a\xff b"', b"\xe4=1", [], b""), key=None)
    assert (variables["ERA_HTTP_PATH"], variables["ERA_HTTP_QUERY"]) == ('/a%FF%20b"', "?%E4=1")
