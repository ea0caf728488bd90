"""The service compared with a dictionary: whatever is done to sessions, in any order and with kills in between."""

from __future__ import annotations

import json
import signal
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.conftest import MakeServer, Server
from tests.store.s3 import S3

PATHS = st.sampled_from(["a", "b.txt", "d/e", "d/f/g", "ü ñ"])
CONTENTS = st.binary(max_size=40)
DATA = st.dictionaries(
    st.sampled_from(["n", "k", "ü"]), st.one_of(st.integers(), st.text(max_size=5), st.none()), max_size=3
)

RUN = """
import json, os
change = json.loads(os.environ["CHANGE"])
for path, content in change["write"].items():
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as file: file.write(bytes.fromhex(content))
for path in change["remove"]:
    if os.path.exists(path): os.remove(path)
if change["state"] is not None:
    with open(".session_data.json", "w") as file: file.write(change["state"])
if change["exit"] is None:
    import time; time.sleep(30)
raise SystemExit(change["exit"])
"""


def above(path: str) -> set[str]:
    """The directories that a file of this path is in."""
    parts = path.split("/")
    return {"/".join(parts[:count]) for count in range(1, len(parts))}


@dataclass
class State:
    """The data and files of a session, and the directories, which stay when their files are removed."""

    data: dict[str, Any]
    files: dict[str, bytes]
    directories: set[str] = field(default_factory=set)

    def write(self, path: str, content: bytes) -> None:
        self.files[path] = content
        self.directories |= above(path)


@dataclass
class Model:
    """The expected state and versions of a session."""

    state: State
    versions: dict[int, State] = field(default_factory=dict)

    @property
    def version(self) -> int:
        return max(self.versions)

    def has_other(self, data: dict[str, Any] | None) -> bool:
        """Whether this is a change of its data; None is none. True and 1 are different, and so are two orders."""
        return data is not None and json.dumps(data) != json.dumps(self.state.data)

    def commit(self) -> None:
        self.versions[max(self.versions, default=0) + 1] = deepcopy(self.state)


class Service(RuleBasedStateMachine):
    """The rules of a Hypothesis state machine. `server` is set before a search begins."""

    server: Server
    sessions = Bundle("sessions")
    gone = Bundle("gone")

    def __init__(self) -> None:
        super().__init__()
        self.models: dict[str, Model] = {}
        self.touched: set[str] = set()
        self.made = 0
        self.connect()

    def connect(self) -> None:
        self.client = self.server.client()

    def call(self, method: str, path: str, expected: int, **options: Any) -> httpx.Response:
        """Send a request, which must be answered with this status."""
        answer = self.client.request(method, f"/api/sessions{path}", **options)
        assert answer.status_code == expected, answer.text
        return answer

    @initialize(target=sessions, data=DATA)
    def first(self, data: dict[str, Any]) -> str:
        return self._create(data)

    @rule(target=sessions, data=DATA)
    def create(self, data: dict[str, Any]) -> str:
        return self._create(data)

    def _create(self, data: dict[str, Any]) -> str:
        self.made += 1
        session = f"m{self.made}"
        self.call("POST", "", 201, json={"language": "python", "session_id": session, "data": data})
        self._add(session, State(data, {}))
        return session

    @rule(
        session=sessions,
        write=st.dictionaries(PATHS, CONTENTS, max_size=2),
        remove=st.lists(PATHS, max_size=1),
        data=st.none() | DATA,
    )
    def run(self, session: str, write: dict[str, bytes], remove: list[str], data: dict[str, Any] | None) -> None:
        """A run changes files and data. It may exit with any code, and what it did is committed."""
        outcome = self._run(session, write, remove, None if data is None else json.dumps(data), exit_code=len(write))
        assert outcome["exit_code"] == len(write)
        model = self.models[session]
        # What is written and then removed was never there, but its directories are.
        written = write.keys() - set(remove)
        changes = bool(written) or any(path in model.state.files for path in remove) or model.has_other(data)
        changes = changes or any(above(path) - model.state.directories for path in write)
        for path, content in write.items():
            model.state.write(path, content)
        for path in remove:
            model.state.files.pop(path, None)
        if data is not None:
            model.state.data = data
        if changes:
            model.commit()
        assert outcome["state"] == {"version": model.version, "committed": True, "reason": None}

    @rule(
        session=sessions,
        write=st.dictionaries(PATHS, CONTENTS, min_size=1, max_size=2),
        how=st.sampled_from(["broken", "atomic", "timeout"]),
    )
    def run_in_vain(self, session: str, write: dict[str, bytes], how: str) -> None:
        """A run with a broken state file, or an atomic run that fails, changes nothing."""
        if how == "broken":
            outcome = self._run(session, write, [], "{", exit_code=0)
        elif how == "atomic":
            outcome = self._run(session, write, [], '{"lost": 1}', exit_code=3, atomic=True)
        else:
            outcome = self._run(session, write, [], '{"lost": 1}', exit_code=None, atomic=True, timeout=0.3)
            assert outcome["status"] == "timeout"
        assert outcome["state"]["committed"] is False
        assert outcome["state"]["version"] == self.models[session].version

    @rule(session=sessions, path=PATHS, content=CONTENTS)
    def put(self, session: str, path: str, content: bytes) -> None:
        self.call("PUT", f"/{session}/files/{path}", 200, content=content)
        self.models[session].state.write(path, content)
        self._committed(session)

    @rule(session=sessions, path=PATHS)
    def remove(self, session: str, path: str) -> None:
        there = path in self.models[session].state.files
        self.call("DELETE", f"/{session}/files/{path}", 200 if there else 404)
        if there:
            del self.models[session].state.files[path]
            self._committed(session)

    @rule(session=sessions, path=PATHS)
    def get(self, session: str, path: str) -> None:
        content = self.models[session].state.files.get(path)
        answer = self.call("GET", f"/{session}/files/{path}", 404 if content is None else 200)
        assert content is None or answer.content == content

    @rule(session=sessions, data=DATA)
    def change_data(self, session: str, data: dict[str, Any]) -> None:
        self.call("PATCH", f"/{session}", 200, json={"data": data})
        changes = self.models[session].has_other(data)
        self.models[session].state.data = data
        if changes:
            self._committed(session)

    @rule(target=sessions, session=sessions, chance=st.randoms(use_true_random=False), data=st.none() | DATA)
    def duplicate(self, session: str, chance: Any, data: dict[str, Any] | None) -> str:
        self.made += 1
        copy = f"m{self.made}"
        source = chance.choice(sorted(self.models[session].versions))
        body = {"id": copy, "from_version": source, **({} if data is None else {"data": data})}
        self.call("POST", f"/{session}/duplicate", 201, json=body)
        state = deepcopy(self.models[session].versions[source])
        if data is not None:
            state.data = data
        self._add(copy, state)
        return copy

    @rule(session=sessions, chance=st.randoms(use_true_random=False))
    def roll_back(self, session: str, chance: Any) -> None:
        model = self.models[session]
        target = chance.choice(sorted(model.versions))
        self.call("POST", f"/{session}/rollback", 200, json={"version": target})
        model.state = deepcopy(model.versions[target])
        self._committed(session)

    @rule(target=gone, session=consumes(sessions))
    def delete(self, session: str) -> str:
        self.call("DELETE", f"/{session}", 200)
        self.call("GET", f"/{session}", 404)
        return session

    @rule(target=sessions, session=consumes(gone))
    def restore(self, session: str) -> str:
        self.call("POST", f"/{session}/restore", 200)
        self.touched.add(session)
        return session

    @rule(kill=st.booleans())
    def restart(self, kill: bool) -> None:
        self.client.close()
        self.server.stop(signal.SIGKILL if kill else signal.SIGTERM)
        self.server.start()
        self.connect()
        self.touched |= self.models.keys()

    @invariant()
    def sessions_are_what_they_should_be(self) -> None:
        for session in self.touched:
            answer = self.client.get(f"/api/sessions/{session}?include=files")
            if answer.status_code == 404:
                continue  # it is deleted, as `delete` has checked
            body, model = answer.json(), self.models[session]
            assert body["data"] == model.state.data
            assert body["version"] == model.version
            assert {file["path"]: file["size"] for file in body["files"]} == {
                path: len(content) for path, content in model.state.files.items()
            }
        self.touched.clear()

    def teardown(self) -> None:
        try:
            for session, model in self.models.items():
                for path, content in model.state.files.items():
                    answer = self.client.get(f"/api/sessions/{session}/files/{path}")
                    assert answer.status_code == 404 or answer.content == content
        finally:
            assert self.client.delete("/api/sessions").status_code == 200
            self.client.close()

    def _add(self, session: str, state: State) -> None:
        self.models[session] = Model(deepcopy(state))
        self._committed(session)

    def _committed(self, session: str) -> None:
        self.models[session].commit()
        self.touched.add(session)

    def _run(
        self,
        session: str,
        write: dict[str, bytes],
        remove: list[str],
        state: str | None,
        exit_code: int | None,
        **more: Any,
    ) -> dict[str, Any]:
        change = {
            "write": {path: content.hex() for path, content in write.items()},
            "remove": remove,
            "state": state,
            "exit": exit_code,
        }
        body = {"code": RUN, "env": {"CHANGE": json.dumps(change)}, **more}
        self.touched.add(session)
        outcome: dict[str, Any] = self.call("POST", f"/{session}/run", 200, json=body).json()
        return outcome


def _search(server: Server, examples: int, steps: int) -> None:
    machine = type("ServiceHere", (Service,), {"server": server})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_on_local_blobs(own_server: MakeServer) -> None:
    _search(own_server(drain_seconds="2"), examples=2, steps=30)


@pytest.mark.soak
def test_on_a_bucket(own_server: MakeServer, s3: S3, bucket: str) -> None:
    _search(own_server(blobs=s3.url(bucket), drain_seconds="2"), examples=1, steps=15)


@pytest.mark.soak
def test_for_longer(own_server: MakeServer) -> None:
    machine_server = own_server(drain_seconds="2")
    machine = type("LongService", (Service,), {"server": machine_server})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=15,
            stateful_step_count=40,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
