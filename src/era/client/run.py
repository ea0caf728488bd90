"""`era run`: one program, in a session or in a place of its own, with its output and its exit code."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from era.client.calls import call, checked, connect, stream
from era.client.failure import Failure
from era.client.options import DEFAULT_SERVER, Server
from era.urls import session_path

if TYPE_CHECKING:
    import httpx


def run(
    file: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *args: str,
    language: Annotated[str | None, Parameter(alias="-l")] = None,
    session: Annotated[str | None, Parameter(alias="-s")] = None,
    data: str | None = None,
    env: Annotated[list[str] | None, Parameter(alias="-e", negative="")] = None,
    secret: Annotated[list[str] | None, Parameter(negative="")] = None,
    timeout: float | None = None,
    stdin: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    cwd: str | None = None,
    server: Server = DEFAULT_SERVER,
) -> int:
    """Run FILE on a server and leave with its exit code.

    With --session the code runs in that session, which is made if it does not exist; without, in one that is deleted
    afterwards. A server with a key wants it in ERA_API_KEY.

    Examples:

        era run hello.py
        era run count.py --session counter --data '{"count": 0}'
        echo 'console.log(process.env.NAME)' | era run - --language node --env NAME=Ada
        era run issues.py --secret GITHUB_TOKEN=api.github.com
        era run deploy.js --secret KEY=api.example.com,*.example.org --session shop
        era run report.py --stdin numbers.csv -- --verbose 2026

    Parameters
    ----------
    file
        The program; `-` for standard input.
    args
        Arguments for it. Behind `--` they may begin with hyphens.
    language
        One of the server's (see GET /api/languages). Default: the one that FILE's ending belongs to.
    session
        Run in this session.
    data
        JSON object that becomes the session's data before the run; needs --session.
    env
        NAME=VALUE for this run only; NAME alone takes the value it has here. May be repeated.
    secret
        NAME=HOST,HOST…: the variable NAME that there is here, for these hosts only. The program sees a placeholder,
        which becomes the value on the way to one of them. May be repeated.
    timeout
        Seconds the run may take.
    stdin
        A text file that is the program's standard input; `-` for this command's own.
    cwd
        The directory to start in, below the session's.
    server
        The server's address.
    """
    body: dict[str, Any] = {
        "code": _read(file),
        "env": dict(map(_variable, env or [])),
    }
    if secret:
        body["secrets"] = dict(map(_secret, secret))
    if timeout is not None:
        body["timeout"] = timeout
    if args:
        body["args"] = list(args)
    if stdin is not None:
        if stdin == file == "-":
            raise Failure("Standard input can't be both the program and its input.")
        body["stdin"] = _read(stdin)
    if cwd is not None:
        body["cwd"] = cwd
    state = _json_object(data)
    if state is not None and session is None:
        raise Failure("--data is the state of a session: say which with --session.")
    with connect(server) as client:
        if session is None:
            answer = _run_once(client, language, file, body)
        else:
            _prepare(client, session, language, file, state)
            answer = _run_in(client, session, body)
    if answer["status"] not in ("ok", "failed"):
        print(f"era: {answer['status']} after {answer['duration']}", file=sys.stderr)
    for name in ("stdout", "stderr"):
        if answer[f"{name}_truncated"]:
            print(f"era: {name} is not all there, it was too long", file=sys.stderr)
    return int(answer["exit_code"])


def _run_once(client: httpx.Client, language: str | None, file: str, body: dict[str, Any]) -> dict[str, Any]:
    """Run without a session, print the output, return the answer."""
    language = language or _language_of(client, file)
    if language is None:
        raise Failure(f"Which language is {file}? Say so with --language.")
    answer = call(client, "POST", "/api/execute", {**body, "language": language})
    sys.stdout.write(answer["stdout"])
    sys.stderr.write(answer["stderr"])
    return answer


def _prepare(client: httpx.Client, session: str, language: str | None, file: str, data: dict[str, Any] | None) -> None:
    """Create the session with `data` if it doesn't exist; else replace its data, unless `data` is None."""
    response = client.get(session_path(session))
    if response.status_code == 404:
        language = language or _language_of(client, file)
        if language is None:
            raise Failure(f"There is no session '{session}'. To make it, say --language.")
        call(client, "POST", "/api/sessions", {"language": language, "session_id": session, "data": data or {}})
        return
    own_language = checked(response)["language"]
    if data is not None:
        call(client, "PATCH", session_path(session), {"data": data})
    if language is not None and language != own_language:
        print(f"era: session '{session}' runs {own_language}", file=sys.stderr)


def _run_in(client: httpx.Client, session: str, body: dict[str, Any]) -> dict[str, Any]:
    """Run in a session and print output as it comes. Returns the answer, which is the stream's `done` event."""
    with stream(client, "POST", f"{session_path(session)}/stream", json=body) as response:
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue
            event: dict[str, Any] = json.loads(line.removeprefix("data: "))
            if event["type"] == "done":
                if not event["state"]["committed"]:
                    print(f"era: nothing was kept of this run: {event['state']['reason']}", file=sys.stderr)
                return event
            if event["type"] == "error":
                raise Failure(event["error"])
            output = sys.stdout if event["type"] == "stdout" else sys.stderr
            output.write(event["content"])
            output.flush()
    raise Failure("The server hung up before the run was over.")


def _language_of(client: httpx.Client, file: str) -> str | None:
    """The server's language for the ending of a file's name."""
    languages = call(client, "GET", "/api/languages")["languages"]
    return next((language["name"] for language in languages if Path(file).suffix in language["endings"]), None)


def _read(file: str) -> str:
    """The text of a file; `-` is standard input."""
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{file} can't be read: {error}") from None


def _json_object(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Failure(f"--data is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Failure("--data is not a JSON object.")
    return value


def _secret(item: str) -> tuple[str, dict[str, Any]]:
    """The name and the API's value of one --secret."""
    name, _, hosts = item.partition("=")
    if not hosts:
        raise Failure("--secret wants a name and hosts: NAME=api.example.com.")
    if name not in os.environ:
        raise Failure(f"--secret {name} has no value: there is no variable {name} here.")
    return name, {"value": os.environ[name], "hosts": hosts.split(",")}


def _variable(item: str) -> tuple[str, str]:
    """The name and value of one --env."""
    name, equals, value = item.partition("=")
    if not equals:
        if name not in os.environ:
            raise Failure(f"--env {name} has no value, and there is no variable {name} here.")
        value = os.environ[name]
    return name, value
