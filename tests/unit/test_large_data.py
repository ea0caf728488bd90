"""Sessions whose data has very many small values: it is parsed and written beside the event loop, for which others
wait."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from era.api.routes.mcp import Mcp, _without_arguments
from era.api.routing.context import claim_of
from era.core import jsontext
from era.core.metadata import SessionChange
from era.core.models import NewSession
from era.core.sessions.versions import Versions
from era.errors import TooLarge
from era.wire.base import EgressBody, LimitsBody
from era.wire.processes import PtyBody, StartProcess
from era.wire.runs import RunBody, SecretBody
from era.wire.sessions import CreateSession, DuplicateBody
from era.wire.setup import PipRequirements, SetupBody
from tests.owners import mine
from tests.unit.core import Core

S = mine("s")
MIB = 1 << 20
ONES = {"n": [1] * 300_000}


@pytest.fixture
def on_the_loop(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What long JSON the thread of the event loop parses and writes."""
    seen, loop_thread = list[str](), threading.current_thread()
    decode, encode, iterencode = json.JSONDecoder.decode, json.JSONEncoder.encode, json.JSONEncoder.iterencode

    def noted(what: str, size: int) -> None:
        if size > jsontext.IN_THREAD and threading.current_thread() is loop_thread:
            seen.append(what)

    def decoded(self: json.JSONDecoder, text: str, *given: Any) -> Any:
        noted("parsed", len(text))
        return decode(self, text, *given)

    def encoded(self: json.JSONEncoder, value: Any) -> str:
        text = encode(self, value)
        noted("written", len(text))
        return text

    def encoded_in_pieces(self: json.JSONEncoder, value: Any, *given: Any, **named: Any) -> Any:
        size = 0
        for piece in iterencode(self, value, *given, **named):
            size += len(piece)
            yield piece
        noted("written in pieces", size)

    monkeypatch.setattr(json.JSONDecoder, "decode", decoded)
    monkeypatch.setattr(json.JSONEncoder, "encode", encoded)
    monkeypatch.setattr(jsontext._ENCODER, "iterencode", encoded_in_pieces.__get__(jsontext._ENCODER), raising=False)
    return seen


@pytest.mark.parametrize("changes", [False, True])
async def test_a_run_reads_and_writes_large_data_beside_the_event_loop(
    core: Core, on_the_loop: list[str], changes: bool
) -> None:
    await core.session("s", data=jsontext.compact(ONES))
    on_the_loop.clear()
    code = "import json\ntext = open('.session_data.json').read()\nprint(len(json.loads(text)['n']))\n"
    if changes:
        code += "open('.session_data.json', 'w').write(text.replace('1', '2'))"
    claim = core.claim("k")
    ran = await core.run(code, claim=claim)
    assert (ran.result.status, ran.stdout) == ("ok", b"300000\n")
    data = ran.result.data
    assert data == {"n": [2 if changes else 1] * 300_000}
    assert on_the_loop == []


@pytest.mark.slow
@pytest.mark.parametrize("is_sound", [True, False], ids=["", "weakened"])
@pytest.mark.parametrize("what", ["data", "metadata", "changed data", "changed metadata", "copied data"])
async def test_large_data_of_a_request_is_checked_beside_the_event_loop(
    core: Core, on_the_loop: list[str], what: str, is_sound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_sound:
        monkeypatch.setattr(jsontext, "is_longer", lambda *_: False)
    await core.session()
    given: dict[str, Any] = {"data": {}, "metadata": {}} | {what: ONES}
    if what == "changed data":
        await core.sessions.change(S, SessionChange(), ONES)
    elif what == "changed metadata":
        await core.sessions.change(S, SessionChange(metadata=ONES), None)
    elif what == "copied data":
        nobody: Any = None
        versions = Versions(core.store, nobody, core.turns, core.idempotency, nobody, core.liveness)
        await versions.duplicate(S, new_id="t", data=ONES, from_version=None)
    else:
        new = NewSession(mine("t"), "python", True, "{}", given["metadata"], False, False, 1.0)
        await core.sessions.create(new, given["data"])
    looked_at = [each for each in on_the_loop if each == "written"]
    assert (looked_at == []) is is_sound


BODIES: dict[str, BaseModel] = {
    "all of a run": RunBody(
        code="é",
        stdin="\U0001f600\\",
        env={"A": "1"},
        secrets={
            "T": SecretBody(value="v", hosts=["a.example"]),
            "U": SecretBody(value="w", hosts=["a.example"], plain_http=True),
        },
        timeout=30,
        args=["a"],
        command=["a", "b"],
    ),
    "a long run": RunBody(code="", stdin="é" * 100_000),
    "a session": CreateSession(
        language="python",
        data={"b": [1, 1.5, True, None, {"z": "é", "a": 1e300}], "a": {}},
        metadata={"é": ""},
        limits=LimitsBody(cpus=1),
        egress=EgressBody(allow=["a.example"]),
        setup=SetupBody(pip=PipRequirements(requirements="a")),
    ),
    "a large session": CreateSession(language="python", data=ONES, metadata={str(n): "é" for n in range(50_000)}),
    "a copy": DuplicateBody(),
    "a process": StartProcess(command="a", pty=PtyBody(cols=9), timeout=1),
}


@pytest.mark.parametrize("name", BODIES)
async def test_the_hash_of_a_request_is_as_it_was(core: Core, on_the_loop: list[str], name: str) -> None:
    """It is stored, and compared with that of a request which may come after an update."""
    context: Any = SimpleNamespace(idempotency=core.idempotency)
    claim = await claim_of(context, "run", "k", BODIES[name])
    assert on_the_loop == []
    fields = BODIES[name].model_dump()
    fields.pop("env", None)
    if fields.pop("secrets", None):
        fields["secrets"] = {"T": ["a.example"], "U": [["a.example"], "plain_http"]}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    assert claim is not None
    assert claim.request_hash == hashlib.sha256(text.encode()).hexdigest()


async def test_what_is_nested_too_deeply_to_be_hashed_is_refused(core: Core) -> None:
    deep: Any = {"a": "a" * 100_000}
    for _ in range(2_000):
        deep = {"a": deep}
    with pytest.raises(TooLarge, match="deeper than 64"):
        await claim_of(
            cast(Any, SimpleNamespace(idempotency=core.idempotency)),
            "create",
            "k",
            CreateSession.model_construct(language="python", data=deep),
        )


@pytest.mark.parametrize("is_sound", [True, False], ids=["", "weakened"])
async def test_the_protocol_s_library_gets_no_large_arguments(
    on_the_loop: list[str], is_sound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It parses them on the event loop, and validates each value several times."""
    if not is_sound:
        monkeypatch.setattr(jsontext, "takes_long", lambda _: False)
    arguments = {"data": ONES, "metadata": {"a": 1}}
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call"}
    text = json.dumps(call | {"params": {"name": "era_create_session", "arguments": arguments}})
    on_the_loop.clear()
    seen = list[Any]()

    class Library:
        async def handle_request(self, scope: Scope, receive: Receive, send: Send) -> None:
            seen.extend([scope["state"], dict(scope["headers"]), (await receive())["body"]])

    async def loaded() -> Any:
        return Library(), Library()

    async def receive() -> Message:
        return {"type": "http.request", "body": text.encode(), "more_body": False}

    async def send(message: Message) -> None:
        raise AssertionError(message)

    mcp = Mcp()
    mcp._managers = asyncio.create_task(loaded())
    await mcp({"headers": [(b"content-length", str(len(text)).encode())], "state": {}}, receive, send)
    state, headers, body = seen
    assert headers[b"content-length"] == str(len(body)).encode()
    if is_sound:
        assert json.loads(body) == call | {"params": {"name": "era_create_session"}}
        assert state == {"mcp_arguments": arguments}
    assert (len(body) < 1000) is is_sound
    assert on_the_loop == []


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("tools/list", {"a": [1] * 40_000}),
        ("tools/call", {"arguments": {}, "_meta": {"a": [1] * 40_000}}),
        ("x" * MIB, {}),
    ],
)
async def test_what_is_large_beside_the_arguments_is_refused(method: str, params: Any) -> None:
    text = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
    with pytest.raises(TooLarge, match="too large"):
        await _without_arguments(text.encode())


@pytest.mark.parametrize("field", ["data", "metadata"])
async def test_arguments_that_no_session_can_have_are_refused_as_they_are_read(field: str) -> None:
    text = json.dumps({"params": {"name": "era_create_session", "arguments": {field: {"n": [0] * 600_000}}}})
    with pytest.raises(TooLarge, match=f"'{field}' is over 1048576 bytes"):
        await _without_arguments(text.encode())


async def test_what_a_cell_answered_is_kept_and_read_beside_the_event_loop(core: Core, on_the_loop: list[str]) -> None:
    deep: Any = {"a": "Ä"}
    for _ in range(63):  # as deep as a result may be
        deep = {"a": deep}
    cell = {"context": "c", "results": [{"data": {"application/json": ONES, "text/plain": "\0"}, "metadata": deep}]}
    kept = await core.outputs.keep(core.outputs.new(), cell)
    assert kept is not None
    assert await core.outputs.cell(kept) == cell
    assert on_the_loop == []
