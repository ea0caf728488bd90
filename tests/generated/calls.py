"""The calls that generated clients make of every operation of the API's description, in an order in which they can be
answered."""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Call:
    """One call. A text `$NAME` anywhere in it is what an earlier call has kept under that name."""

    operation: str
    body: Any = None
    """JSON, or bytes as `{"bytes": BASE64 or $NAME}`."""

    query: dict[str, Any] = field(default_factory=dict)
    status: int | None = None
    """None: the first that the description has."""

    keep: dict[str, str] = field(default_factory=dict)
    """Names of parts of the answer, each as the path to it, such as `runs.0.run_id`; an empty path is all its bytes."""

    path: dict[str, Any] = field(default_factory=dict)
    """Parameters of the path that differ from PATH."""


PATH = {"session_id": "walked", "process": "cat", "name": "main", "namespace": "walked", "key": "a:b", "number": 1}
PATH |= {"path": "a.txt", "stream": "stdout", "owner": "alice"}


def _bytes(content: bytes) -> dict[str, str]:
    return {"bytes": base64.b64encode(content).decode()}


_CODE = "import json\nd = json.load(open('.session_data.json'))\nd['n'] += 1\n"
_CODE += "json.dump(d, open('.session_data.json', 'w'))\nprint(d['n'])"

CALLS = [
    *(Call(name) for name in ("health", "ready", "metrics", "list_languages", "get_server", "list_hosts")),
    Call(
        "create_session",
        {"language": "python", "session_id": "walked", "data": {"n": 1}, "setup": {"commands": ["true"]}},
    ),
    *(Call(name) for name in ("setup_events", "set_up_again", "environment", "list_sessions", "get_session")),
    Call("change_session", {"metadata": {"for": "a walk"}, "default_timeout": 60}),
    Call("store_code", {"code": "print('stored')"}),
    Call("stored_code"),
    Call("put_file", _bytes(b"text\n")),
    *(Call(name) for name in ("list_files", "get_file", "stat_file")),
    Call("make_directory", {"path": "below"}),
    Call("move_file", {"from": "a.txt", "to": "below/b.txt"}),
    Call("move_file", {"from": "below/b.txt", "to": "a.txt"}),
    # Runs.
    Call("run", {"code": _CODE, "env": {"A": "b"}}, keep={"run_id": "run_id"}),
    Call("stream", {"code": "print(1)"}),
    Call("execute", {"language": "python", "code": "print(1)"}),
    Call("list_runs"),
    *(Call(name, path={"run_id": "$run_id"}) for name in ("get_run", "follow_run", "get_output", "stop_run")),
    Call("list_all_runs"),
    # Versions.
    Call("list_versions", keep={"version": "versions.0.version"}),
    Call("get_version", path={"number": "$version"}),
    Call("diff_version", path={"number": "$version"}),
    Call("name_version", {"name": "good"}, path={"number": "$version"}),
    Call("clear_name", path={"number": "$version"}),
    Call("list_files_of_version", path={"number": "$version"}),
    Call("get_file_of_version", path={"number": "$version"}),
    Call("get_archive_of_version", path={"number": "$version"}),
    Call("rollback", {"version": "$version"}),
    Call("duplicate", {"id": "copy"}),
    Call("get_archive", keep={"tar": ""}),
    Call("put_archive", {"bytes": "$tar"}),
    Call("export_session", keep={"capsule": ""}),
    Call("import_session", {"bytes": "$capsule"}, {"id": "imported"}),
    Call("create_link", {"path": "a.txt"}, keep={"get_link": "url"}),
    Call("get_by_link", path={"token": "$get_link"}),
    Call("create_link", {"path": "a.txt", "method": "PUT"}, keep={"put_link": "url"}),
    Call("put_by_link", _bytes(b"more\n"), path={"token": "$put_link"}),
    # What goes on beside runs.
    Call("start_process", {"command": ["cat"], "stdin": True, "tag": "cat"}),
    Call("list_processes"),
    Call("get_process"),
    Call("write_stdin", _bytes(b"said\n")),
    Call("close_stdin"),
    Call("follow_process"),
    Call("start_process", {"command": ["sleep", "600"], "pty": {"cols": 80, "rows": 24}, "tag": "nap"}),
    Call("resize_process", {"pty": {"cols": 100, "rows": 30}}, path={"process": "nap"}),
    Call("signal_process", {"signal": "CONT"}, path={"process": "nap"}),
    Call("give_ticket"),
    Call("checkpoint"),
    Call("end_process", path={"process": "nap"}),
    Call("run", {"code": "x = 1", "context": "main"}),
    *(Call(name) for name in ("list_contexts", "interrupt_context", "restart_context", "delete_context")),
    Call("stop_session"),
    Call("watch_files", query={"path": "none"}, status=404),  # of a path that is there, it has no end
    Call("public_url", query={"port": 80}),
    # `received` has an inbox and a delivery already.
    Call("put_inbox", {}),
    Call("get_inbox"),
    Call("delete_inbox"),
    Call("list_deliveries", path={"session_id": "received"}, keep={"delivery": "deliveries.0.id"}),
    Call("get_delivery", path={"session_id": "received", "delivery_id": "$delivery"}),
    Call("replay_delivery", path={"session_id": "received", "delivery_id": "$delivery"}, status=202),
    # Storage.
    Call("put_value", {"value": "text"}),
    *(Call(name) for name in ("get_value", "list_keys", "delete_value", "clear_keys")),
    Call("put_object", {"content": "aGk="}),
    *(Call(name) for name in ("get_object", "list_objects", "list_resources", "resource_stats")),
    Call("delete_object"),
    Call("clear_objects"),
    Call("run_statements", {"sql": "CREATE TABLE t (n INTEGER)"}),
    Call("run_statement", {"sql": "SELECT ? AS n", "params": [7]}),
    Call("drop_database"),
    # What the operator sees to.
    Call("create_api_key", {"owner": "alice"}, keep={"key_id": "id"}),
    Call("list_api_keys"),
    Call("get_api_key", path={"key_id": "$key_id"}),
    Call("change_api_key", {"scopes": ["read"]}, path={"key_id": "$key_id"}),
    Call("rotate_api_key", {}, path={"key_id": "$key_id"}, keep={"new_key_id": "id"}),
    Call("revoke_api_key", path={"key_id": "$new_key_id"}),
    Call("list_owners"),
    Call("change_owner", {"quotas": {"sessions": 5}}),
    *(Call(name) for name in ("get_owner", "get_quotas", "get_usage", "list_audit")),
    Call("create_webhook", {"url": "http://203.0.113.7/hook", "events": ["quota.reached"]}, keep={"webhook": "id"}),
    Call("list_webhooks"),
    Call("list_notices", path={"webhook_id": "$webhook"}),
    Call("replay_notice", path={"webhook_id": "$webhook", "delivery_id": "none"}, status=404),
    Call("delete_webhook", path={"webhook_id": "$webhook"}),
    # The end of it.
    Call("delete_file"),
    Call("delete_session", path={"session_id": "copy"}),
    Call("restore_session", path={"session_id": "copy"}),
    Call("delete_sessions"),
]


def as_json() -> list[dict[str, Any]]:
    """The calls with all of their parameters."""
    return [asdict(call) | {"path": PATH | call.path} for call in CALLS]
