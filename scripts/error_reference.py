#!/usr/bin/env python3
"""error_reference.py [--check]: write the tables of docs/errors.md, of the codes that the server's sources name.
With --check, only say whether it is up to date."""

from __future__ import annotations

import sys
from http import HTTPStatus
from pathlib import Path

from era import errors

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errors.md"
MARK = "<!-- Made by scripts/error_reference.py from here on. -->\n"

sys.path.insert(0, str(ROOT / "clients" / "typescript"))
from generate import codes  # noqa: E402  the one place that finds them

WHEN = {
    "answer_gone": "The request of this `Idempotency-Key` has been carried out, and its answer isn't kept any more",
    "answer_timeout": "The program behind a public URL gave no answer in time",
    "bad_archive": "The archive is damaged, or has an entry that a session can't have",
    "bad_capsule": "The capsule is damaged or incomplete, or isn't as ERA writes one",
    "bad_hop": "A request claims to come from another host of the cluster, and isn't signed as such",
    "bad_key": "An `Idempotency-Key` or a key of the storage isn't one that there can be",
    "bad_message": "A text message over a WebSocket is no control message",
    "bad_namespace": "The name of a namespace isn't one that there can be",
    "bad_path": "The path of a file isn't one that there can be",
    "bad_request": "The request can't be right",
    "bad_setup": "The `setup` names a package or a command that can't be right",
    "bad_signature": "A delivery isn't signed, or not with the inbox's secret",
    "being_stopped": "The session's processes are being ended, and the call can't wait for that",
    "changed": "A process changed the file while the call was under way",
    "commit_failed": "The run ended, but its result couldn't be stored",
    "conflict": "There is one with this id already, or the present state doesn't allow the call",
    "damaged_backup": "A backup can't be restored, since files of it are damaged or missing",
    "exists": "Something is there already, where a file is to be moved to",
    "expired": "The session has expired",
    "fenced": "In a cluster: the session has moved to another host, so this host may not store its result",
    "forbidden": "The server refuses the caller's origin or host name, or shows this to its operator only",
    "headers_too_large": "The request's URL or headers are too large",
    "home_lost": "In a cluster: the session's host died, or was cut off, while it was answering",
    "home_unreachable": "In a cluster: the session's host can't be reached",
    "host_lost": "In a cluster: this host was declared dead, and is ending",
    "idempotency_mismatch": "The `Idempotency-Key` was used for another request before",
    "input_not_read": "The process has read nothing of its input for 30 seconds",
    "internal": "A fault of ERA",
    "invalid_field": "A field or parameter is unknown, missing, or has a value that it can't have; `details` names it",
    "invalid_json": "The body isn't JSON",
    "is_a_directory": "The path is a directory, and the call is for files",
    "is_a_file": "The path is a file, and the call is for directories",
    "is_a_link": "The path is a symbolic link, and these are never followed",
    "is_no_file": "The path is a pipe, a socket or a device",
    "is_running": "The delivery is being run at this moment",
    "key_expired": "An API key that has expired can't be given another secret",
    "link_expired": "The link's time is up",
    "method_not_allowed": "The path exists, but not with this method",
    "no_answer": "The program behind a public URL gave no answer that can be sent",
    "nothing_listens": "No process of the live session listens on the port, and it has no stored code",
    "no_checkpoint": "No checkpoint could be made of the session as it is",
    "no_code": "A run without code, in a session that has no stored code",
    "no_contexts": "The language has no contexts, or the server lacks what they need",
    "no_file": "There is no file at this path",
    "no_inbox": "The session has no inbox",
    "no_input": "The process takes no input, or no more",
    "no_isolation": "The kind of sandbox that the session asks for isn't available",
    "no_language": "The server's machine can't run this language",
    "no_lease": "In a cluster: this host has lost touch with the database",
    "no_link": "The URL is no link, or none any more",
    "no_live_files": "The helper through which files of a live session are reached has ended",
    "no_operator": "API keys can't be made on a server that was started without `ERA_API_KEY`",
    "no_permission": "In a live session: the file's permissions don't allow it",
    "no_result": "The run ended without a result on its record",
    "no_such_context": "The session has no such context",
    "no_such_delivery": "The inbox has no such delivery",
    "no_such_name": "The version has no name",
    "no_such_process": "The session has no such process",
    "no_such_run": "The session has no such run",
    "no_such_version": "The session never had this version",
    "not_a_websocket": "The call is a WebSocket, and the request doesn't open one",
    "not_found": "There is no such session or path",
    "not_live": "The session that was watched isn't live any more; watch again to follow its versions",
    "not_operator": "Only the operator may do this",
    "not_persistent": "The session was made with `persistent` false, and keeps no files",
    "not_public": "The session's public URL is closed; or a program of a session called more of the server than it may",
    "not_ready": "The server can take no runs: it is stopping, or can't store anything",
    "outcome_unknown": "The database was cut off, or failed, while it stored what the call was to do",
    "output_gone": "The run's output isn't kept any more",
    "precondition_failed": "The file isn't as `If-Match` or `If-None-Match` demands",
    "process_ended": "The process has ended",
    "quota_reached": "The owner or the API key has as much as its quota allows",
    "range_not_satisfiable": "The `Range` lies behind the end of the content",
    "rate_reached": "The owner or the API key has done as much as its quota allows in this time",
    "run_lost": "The server died during the run that this `Idempotency-Key` stands for",
    "run_under_way": "A run is going on, and the change would have to wait for it",
    "sandbox_failed": "No sandbox could be made, or it died before the program began",
    "scope_missing": "The API key isn't good for this kind of call",
    "service_failed": "The session's service ended instead of listening",
    "session_deleted": "The session was deleted during the run",
    "session_live": "The session has processes, so its files can't be replaced as a whole",
    "session_moved": "In a cluster: the session has moved to another host",
    "setup_under_way": "The session's packages aren't installed yet",
    "sql_error": "The SQL statement failed",
    "sql_memory": "The SQL statement needed too much memory",
    "sql_refused": "The SQL statement isn't allowed here",
    "sql_timeout": "The SQL statement took too long",
    "sql_unknown": "The SQL was being committed as its process ended, the disk failed or the database was cut off",
    "storage_full": "The storage for programs, or one of its databases, is full",
    "tag_in_use": "Another process of the session that runs has this tag",
    "too_busy": "The server has more runs to do than it can",
    "too_large": "A body, a field or a file is larger than it may be",
    "too_many_contexts": "The session has as many contexts as it may have",
    "too_many_deliveries": "As many deliveries wait in the inbox as may",
    "too_many_live_sessions": "As many sessions are live as may be",
    "too_many_processes": "The session runs as many processes as it may",
    "too_many_uploads": "As many large uploads are under way as may be",
    "too_many_waiting": "As many runs wait for the session as may",
    "too_many_watches": "The session's files are watched at as many paths, or by as many readers, as may be",
    "too_many_webhooks": "The owner has as many webhooks as there may be",
    "too_much_to_watch": "There are too many directories to watch",
    "too_slow": "The request didn't arrive in time",
    "unauthorized": "No API key, or a wrong one",
    "unavailable": "The server can't do it at the moment",
    "unknown_format": "The capsule is of a newer format than this server knows",
    "unknown_language": "There is no language of this name",
    "unsuitable_name": "A file's name can't be written into this kind of archive",
    "version_gone": "The version isn't kept any more",
    "webhook_refused": "The webhook's URL leads where this server may not connect to",
}
"""What each code means."""


def hints() -> dict[str, str]:
    """What to do, by code, where a class of errors always says the same."""
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    return {each.code: each.hint for each in classes if issubclass(each, errors.EraError) and "hint" in vars(each)}


def reference() -> str:
    by_status: dict[int, list[str]] = {}
    by_code = codes()
    for code, statuses in by_code.items():
        for status in statuses:
            by_status.setdefault(status, []).append(code)
    if unlike := by_code.keys() ^ WHEN.keys():
        sys.exit(f"scripts/error_reference.py: WHEN and the server's codes differ in {', '.join(sorted(unlike))}")
    known = hints()
    lines = []
    for status in sorted(by_status):
        lines += [f"## {status} {HTTPStatus(status).phrase}", ""]
        lines += ["| code | when | what to do |", "| --- | --- | --- |"]
        for code in by_status[status]:
            hint = known.get(code, "").replace("|", "\\|")
            lines.append(f"| `{code}` | {WHEN[code]} | {hint} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    before, _, _ = PAGE.read_text().partition(MARK)
    text = f"{before}{MARK}\n{reference()}"
    if "--check" not in sys.argv:
        PAGE.write_text(text)
    elif text != PAGE.read_text():
        sys.exit("docs/errors.md isn't what the server's sources say: run scripts/error_reference.py")


if __name__ == "__main__":
    main()
