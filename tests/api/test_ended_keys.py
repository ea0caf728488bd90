"""What has no end of its own ends with the key that it was begun with: terminals, watches, followed processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.event_streams import event_data
from tests.api.live import Terminal, refusal, socket, start
from tests.api.owners import OPERATOR_KEY, Owners, client_with_key
from tests.api.test_key_scopes import later, make_key
from tests.conftest import Server

BARRED = 1008

type End = Callable[[httpx.Client, str], httpx.Response]

ENDS: dict[str, End] = {
    "revoked": lambda operator, key: operator.delete(f"/api/keys/{key}"),
    "with fewer rights": lambda operator, key: operator.patch(f"/api/keys/{key}", json={"scopes": ["write"]}),
    "expired": lambda operator, key: operator.patch(f"/api/keys/{key}", json={"expires_at": later(3)}),
    "with another secret": lambda operator, key: operator.post(f"/api/keys/{key}/rotate", json={"grace_seconds": 0}),
}


class Begun:
    """All that a key can begin and that has no end."""

    def __init__(self, server: Server, key: dict[str, Any], other: dict[str, Any], stack: ExitStack) -> None:
        """`other` is a key of the same owner, which stays as it is."""
        self.client = stack.enter_context(client_with_key(server, key["key"]))
        self.other = stack.enter_context(client_with_key(server, other["key"]))
        self.where = self.other.post("/api/sessions", json={"language": "python"}).json()["session_id"]
        stack.callback(self.other.delete, f"/api/sessions/{self.where}?purge=true")
        process = start(self.client, self.where, "echo begun; exec sleep 1000")
        bearer = "Authorization: " + self.client.headers["authorization"]
        paths = [f"{self.where}/terminal", f"{self.where}/processes/{process}/attach"]
        self.sockets = [Terminal(stack.enter_context(socket(server, path, bearer))) for path in paths]
        by_ticket = f"{self.where}/terminal?ticket={self.ticket()}"
        self.sockets.append(Terminal(stack.enter_context(socket(server, by_ticket))))
        self.streams = [
            event_data(stack.enter_context(self.client.stream("GET", f"/api/sessions/{self.where}/{path}")))
            for path in ("watch", f"processes/{process}/events")
        ]
        assert [next(lines)["type"] for lines in self.streams] == ["watching", "stdout"]
        self.shells = [self.sockets[0], self.sockets[2]]
        for shell in self.shells:
            shell.send("echo $((40+2))-there\n")
            shell.until("42-there")

    def ticket(self) -> str:
        return str(self.client.post(f"/api/sessions/{self.where}/tickets").json()["ticket"])


@pytest.mark.parametrize("how", ENDS)
def test_it_ends_when_its_key_is(owners: Owners, how: str) -> None:
    key = make_key(owners)
    with ExitStack() as stack:
        begun = Begun(owners.server, key, make_key(owners), stack)
        unused = begun.ticket()
        assert ENDS[how](owners.operator, key["id"]).is_success
        assert [one.until_closed() for one in begun.sockets] == [BARRED] * 3
        for lines in begun.streams:
            last = list(lines)[-1]
            assert (last["type"], last["code"]) == ("error", "unauthorized")
        assert refusal(owners.server, f"{begun.where}/terminal?ticket={unused}") == (401, "unauthorized")


def test_what_the_key_is_still_good_for_goes_on(owners: Owners) -> None:
    """Its new scopes, the time of grace of a secret, and other keys of the same owner."""
    key = make_key(owners)
    with ExitStack() as stack:
        begun = Begun(owners.server, key, make_key(owners), stack)
        bearer = "Authorization: " + begun.other.headers["authorization"]
        others = Terminal(stack.enter_context(socket(owners.server, f"{begun.where}/terminal", bearer)))
        rotated = owners.operator.post(f"/api/keys/{key['id']}/rotate", json={"grace_seconds": 3600})
        assert rotated.is_success
        for shell in [*begun.shells, others]:
            shell.send("echo $((50+2))-still\n")
            shell.until("52-still")
        assert owners.operator.patch(f"/api/keys/{key['id']}", json={"scopes": ["read"]}).is_success
        assert [one.until_closed() for one in begun.sockets] == [BARRED] * 3
        others.send("echo seen > seen.txt\n")
        seen: list[dict[str, Any]] = []
        for event in begun.streams[0]:
            seen.append(event)
            if event.get("path") == "seen.txt":
                break
        assert all(event["type"] != "error" for event in seen)
        assert owners.operator.delete(f"/api/keys/{key['id']}").is_success
        assert list(begun.streams[0])[-1]["code"] == "unauthorized"
        others.send("echo $((60+2))-still\n")
        others.until("62-still")


FORGETFUL = """
import asyncio
from era.core.owners.api_keys import ApiKeys
async def never(self, caller, scope):
    await asyncio.Event().wait()
ApiKeys.until_barred = never
ApiKeys.admits = lambda self, caller, scope: True
"""


def test_where_nobody_asks_again_a_revoked_key_has_a_shell(tmp_path: Path) -> None:
    server = Server(tmp_path / "data", {"ERA_API_KEY": OPERATOR_KEY}, weakness=FORGETFUL)
    server.start()
    try:
        with ExitStack() as stack:
            operator = stack.enter_context(client_with_key(server, OPERATOR_KEY))
            key = operator.post("/api/keys", json={"owner": "scoped"}).json()
            other = operator.post("/api/keys", json={"owner": "scoped"}).json()
            begun = Begun(server, key, other, stack)
            unused = begun.ticket()
            assert ENDS["revoked"](operator, key["id"]).is_success
            assert begun.client.get("/api/sessions").status_code == 401
            begun.shells[0].send("echo $((50+2))-still\n")
            begun.shells[0].until("52-still")
            assert refusal(server, f"{begun.where}/terminal?ticket={unused}") == (101, "")
    finally:
        server.stop()
