"""The `era` command: serve, and be a client of a server."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import httpx
from cyclopts import App, Parameter

from era import __version__
from era.client import projects
from era.client.transfers import TransferFailed, download, progress, upload
from era.errors import EraError

app = App(
    name="era",
    help_format="plaintext",
    version=__version__,
    help="Run untrusted code in sessions that remember.\n\nStart a server with 'era serve', then 'era run hello.py'.",
)

DEFAULT_SERVER = "http://127.0.0.1:8787"
type Server = Annotated[str, Parameter(env_var="ERA_SERVER")]


class Failure(Exception):
    """What to tell the user before leaving with exit code 2."""


@app.command
def serve(
    *,
    host: str | None = None,
    port: int | None = None,
    data_dir: Path | None = None,
    public_url: str | None = None,
    allow_no_key: bool | None = None,
    isolation: str | None = None,
    log_level: str | None = None,
) -> None:
    """Serve the HTTP API. Every setting is also an ERA_ variable; docs/settings.md has them all.

    Examples:

        era serve
        era serve --port 9000 --data-dir /var/lib/era
        ERA_API_KEY=secret era serve --host 0.0.0.0

    Parameters
    ----------
    host
        Address to serve on; any but loopback needs ERA_API_KEY.
    port
        Port to serve on; 0 lets the system choose one.
    data_dir
        Where sessions, files and the database lie.
    public_url
        URL that programs see as ERA_BASE_URL.
    allow_no_key
        Serve an address other than loopback although no API key is set.
    isolation
        Which sandbox sessions get that don't say: auto, gvisor or bubblewrap.
    log_level
        debug, info, warning or error.
    """
    from pydantic import ValidationError

    from era.app import run_service
    from era.settings import Settings

    given = {name: value for name, value in locals().items() if name in Settings.model_fields and value is not None}
    try:
        settings = Settings(**given)
    except ValidationError as error:
        problem = error.errors()[0]
        raise Failure(f"ERA_{str(problem['loc'][0]).upper()}: {problem['msg']}") from None
    run_service(settings, lambda line: print(line, flush=True))


@app.command
def doctor() -> int:
    """Say which walls this machine gives sandboxes, which are missing, why, and how to get them.

    Makes sandboxes of each kind and language and runs a program in each. Leaves with 0 if one kind works, else with 1.

    Example:

        era doctor
    """
    import asyncio

    from era.app import examine
    from era.doctor import report

    found, default = asyncio.run(examine())
    for line in report(found, default):
        print(line)
    return 0 if default else 1


@app.command
def run(
    file: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    language: Annotated[str | None, Parameter(alias="-l")] = None,
    session: Annotated[str | None, Parameter(alias="-s")] = None,
    data: str | None = None,
    env: Annotated[list[str] | None, Parameter(alias="-e", negative="")] = None,
    secret: Annotated[list[str] | None, Parameter(negative="")] = None,
    timeout: float | None = None,
    server: Server = DEFAULT_SERVER,
) -> int:
    """Run FILE on a server and leave with its exit code.

    With --session the code runs in that session, which is made where it does not exist; without, in one that is gone
    afterwards. A server with a key wants it in ERA_API_KEY.

    Examples:

        era run hello.py
        era run count.py --session counter --data '{"count": 0}'
        echo 'console.log(process.env.NAME)' | era run - --language node --env NAME=Ada
        era run issues.py --secret GITHUB_TOKEN=api.github.com
        era run deploy.js --secret KEY=api.example.com,*.example.org --session shop

    Parameters
    ----------
    file
        The program; `-` for standard input.
    language
        One of the server's (see GET /api/languages); told from FILE's ending where it is left out.
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
    server
        The server's address.
    """
    code = sys.stdin.read() if file == "-" else _read(file)
    state = _json_object(data)
    body: dict[str, Any] = {"code": code, "env": dict(_variable(item) for item in env or [])}
    if secret:
        body["secrets"] = dict(_secret(item) for item in secret)
    if timeout is not None:
        body["timeout"] = timeout
    if state is not None and session is None:
        raise Failure("--data is the state of a session: say which with --session.")
    with _client(server) as client:
        if session is None:
            language = language or _language_of(client, file)
            if language is None:
                raise Failure(f"Which language is {file}? Say so with --language.")
            answer = _call(client, "POST", "/api/execute", {**body, "language": language})
            sys.stdout.write(answer["stdout"])
            sys.stderr.write(answer["stderr"])
        else:
            _prepare(client, session, language, file, state)
            answer = _follow(client, f"/api/sessions/{session}/stream", body)
            if not answer["state"]["committed"]:
                print(f"era: nothing was kept of this run: {answer['state']['reason']}", file=sys.stderr)
    if answer["status"] not in ("ok", "failed"):
        print(f"era: {answer['status']} after {answer['duration']}", file=sys.stderr)
    for stream in ("stdout", "stderr"):
        if answer[f"{stream}_truncated"]:
            print(f"era: {stream} is not all there, it was too long", file=sys.stderr)
    return int(answer["exit_code"])


@app.command
def export(
    session: str,
    /,
    *,
    output: Annotated[Path | None, Parameter(alias="-o", allow_leading_hyphen=True)] = None,
    current: Annotated[bool, Parameter(negative="")] = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Write SESSION, with all that belongs to it, into one file.

    Examples:

        era export counter
        era export counter --current --output counter.tar
        era export counter --output - | ssh elsewhere era import -

    Parameters
    ----------
    session
        The session's id.
    output
        The file; SESSION.era.tar where it is left out, `-` for standard output.
    current
        Leave out its past: older versions and the records of runs.
    server
        The server's address.
    """
    target = Path(f"{session}.era.tar") if output is None else output
    query = {"versions": "current"} if current else {}
    path = f"/api/sessions/{quote(session, safe='')}/capsule"
    with _client(server) as client, client.stream("GET", path, params=query) as response:
        if response.status_code != 200:
            response.read()
            _checked(response)
        size = download(response, None if target == Path("-") else target, f"export {session}")
    if target != Path("-"):
        print(f"{target}  {size} bytes")


@app.command(name="import")
def import_(
    file: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    id: Annotated[str | None, Parameter(name="--id")] = None,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Make the session that FILE holds, as `era export` wrote it. Prints the session's id.

    Examples:

        era import counter.era.tar
        era import counter.era.tar --id counter-again

    Parameters
    ----------
    file
        The file; `-` for standard input.
    id
        The session's id here; the one it had where this is left out.
    server
        The server's address.
    """
    query = {} if id is None else {"id": id}
    with _client(server) as client, upload(None if file == "-" else Path(file), f"import {file}") as body:
        made = _checked(client.post("/api/sessions/import", params=query, **body))
    print(made["id"])


@app.command
def push(
    directory: Path,
    /,
    *,
    session: Annotated[str, Parameter(alias="-s")],
    delete: bool = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Bring the files of DIRECTORY into a session: those that it hasn't yet as they are, all or nothing.

    What the directory's .gitignore files leave out stays here, and so do `.git` and links.

    Examples:

        era push . --session app
        era push src --session app --delete

    Parameters
    ----------
    directory
        The project.
    session
        The session's id.
    delete
        Delete what the session has and DIRECTORY hasn't.
    server
        The server's address.
    """
    if not directory.is_dir():
        raise Failure(f"{directory} is no directory.")
    here = projects.Directory(directory)
    try:
        wanted = {path: here.digest(path) for path in projects.files(directory)}
    finally:
        here.close()
    if unread := [path for path, digest in wanted.items() if digest is None]:
        raise Failure(f"{directory / unread[0]} can't be read.")
    with _client(server) as client:
        found = _session_files(client, session)
        changes = projects.differences(wanted, {path: file["etag"] or "" for path, file in found.items()})
        if changes.changed:
            with projects.packed(directory, changes.changed) as archive, upload(archive, f"push {session}") as body:
                _checked(client.put(f"/api/sessions/{quote(session, safe='')}/archive", **body))
        surplus = changes.surplus if delete else []
        for path in surplus:
            _checked(client.delete(_file_url(session, path)))
    print(f"{len(changes.changed)} files pushed, {len(surplus)} deleted, {len(wanted)} in all")


@app.command
def pull(
    directory: Path,
    /,
    *,
    session: Annotated[str, Parameter(alias="-s")],
    delete: bool = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Bring a session's files into DIRECTORY: those that it hasn't yet as they are.

    Nothing outside of DIRECTORY is ever written, whatever the session's files are called. Links stay where they are.

    Examples:

        era pull results --session app
        era pull . --session app --delete

    Parameters
    ----------
    directory
        Where to; made if it isn't there.
    session
        The session's id.
    delete
        Delete what DIRECTORY has and the session hasn't, but for what its .gitignore files leave out.
    server
        The server's address.
    """
    with _client(server) as client:
        found = _session_files(client, session)
        wanted = {path: file["etag"] for path, file in found.items() if file["etag"] and "\ufffd" not in path}
        there = projects.Directory(directory)
        try:
            known = {path: digest for path in wanted if (digest := there.digest(path)) is not None}
            changed = projects.differences(wanted, known).changed
            with progress(f"pull {session}", sum(found[path]["size"] for path in changed)) as advance:
                for path in changed:
                    with client.stream("GET", _file_url(session, path)) as response:
                        if response.status_code != 200:
                            response.read()
                            _checked(response)
                        there.write(path, response.iter_bytes(), advance)
            surplus = [path for path in projects.files(directory) if path not in found] if delete else []
            for path in surplus:
                there.remove(path)
        finally:
            there.close()
    print(f"{len(changed)} files pulled, {len(surplus)} deleted, {len(wanted)} in all")
    if left := len(found) - len(wanted):
        print(f"era: {left} links, or names that aren't UTF-8, were not pulled", file=sys.stderr)


keys = App(name="keys", help="See to the keys that others call a server with. Wants the server's own in ERA_API_KEY.")
app.command(keys)


@keys.command
def create(owner: str, /, *, description: str = "", server: Server = DEFAULT_SERVER) -> None:
    """Make a key for OWNER and print it. It is told this once.

    Example:

        era keys create mina --description "her laptop"

    Parameters
    ----------
    owner
        Whose key it is. Sessions and storage are seen with keys of their own owner only.
    description
        What it is for.
    server
        The server's address.
    """
    with _client(server) as client:
        made = _call(client, "POST", "/api/keys", {"owner": owner, "description": description})
    print(f"{made['id']} is a key of {made['owner']}'s. It is not shown again:", file=sys.stderr)
    print(made["key"])


@keys.command(name="list")
def list_(*, server: Server = DEFAULT_SERVER) -> None:
    """List the keys there are, without the keys themselves.

    Parameters
    ----------
    server
        The server's address.
    """
    with _client(server) as client:
        found = _call(client, "GET", "/api/keys")["keys"]
    for key in found:
        print(f"{key['id']}  {key['created_at']}  {key['owner']}  {key['description']}".rstrip())


@keys.command
def revoke(key_id: str, /, *, server: Server = DEFAULT_SERVER) -> None:
    """Revoke a key, at once. What its owner has stays.

    Parameters
    ----------
    key_id
        As `era keys list` shows it.
    server
        The server's address.
    """
    with _client(server) as client:
        _call(client, "DELETE", f"/api/keys/{quote(key_id, safe='')}")


def main() -> None:
    """Entry point of the `era` command."""
    try:
        sys.exit(app(result_action="return_value"))
    except (Failure, TransferFailed) as failure:
        print(f"era: {failure}", file=sys.stderr)
        sys.exit(2)
    except EraError as error:
        print(f"era: {error.message}\n     {error.hint}", file=sys.stderr)
        sys.exit(2)
    except httpx.ConnectError as error:
        print(f"era: No server answers at {error.request.url}\n     Start one with `era serve`.", file=sys.stderr)
        sys.exit(2)
    except httpx.TransportError as error:
        print(f"era: The server hung up: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _session_files(client: httpx.Client, session: str) -> dict[str, dict[str, Any]]:
    """All of a session's files, by path."""
    found: dict[str, dict[str, Any]] = {}
    query: dict[str, str] = {}
    while True:
        page = _checked(client.get(f"/api/sessions/{quote(session, safe='')}/files", params=query))
        found |= {file["path"]: file for file in page["files"]}
        if page["next_cursor"] is None:
            return found
        query = {"cursor": page["next_cursor"]}


def _file_url(session: str, path: str) -> str:
    return f"/api/sessions/{quote(session, safe='')}/files/{quote(path)}"


def _language_of(client: httpx.Client, file: str) -> str | None:
    """The server's language for files that end so."""
    known = _call(client, "GET", "/api/languages")["languages"]
    return next((language["name"] for language in known if Path(file).suffix in language["endings"]), None)


def _prepare(client: httpx.Client, session: str, language: str | None, file: str, data: dict[str, Any] | None) -> None:
    """Make the session if there is none; else give it `data`, if there is any."""
    found = client.get(f"/api/sessions/{session}")
    if found.status_code == 404:
        language = language or _language_of(client, file)
        if language is None:
            raise Failure(f"There is no session '{session}'. To make it, say --language.")
        _call(client, "POST", "/api/sessions", {"language": language, "session_id": session, "data": data or {}})
        return
    known = _checked(found)["language"]
    if data is not None:
        _call(client, "PATCH", f"/api/sessions/{session}", {"data": data})
    if language is not None and language != known:
        print(f"era: session '{session}' runs {known}", file=sys.stderr)


def _follow(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Print a run's output as it comes; the answer is its `done` event."""
    with client.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            response.read()
            _checked(response)
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue
            event: dict[str, Any] = json.loads(line.removeprefix("data: "))
            if event["type"] == "done":
                return event
            if event["type"] == "error":
                raise Failure(event["error"])
            stream = sys.stdout if event["type"] == "stdout" else sys.stderr
            stream.write(event["content"])
            stream.flush()
    raise Failure("The server hung up before the run was over.")


def _client(server: str) -> httpx.Client:
    key = os.environ.get("ERA_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # A run may take as long as it was allowed to; only connecting has a bound.
    patience = httpx.Timeout(None, connect=10)
    return httpx.Client(base_url=server, headers=headers, timeout=patience, trust_env=False)


def _call(client: httpx.Client, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    return _checked(client.request(method, path, json=body))


def _checked(response: httpx.Response) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = response.json()
    except ValueError:
        raise Failure(f"{response.url} answers {response.status_code}, and not as an ERA server.") from None
    if response.is_error:
        raise Failure(f"{answer.get('error', response.status_code)}\n     {answer.get('hint', '')}".rstrip())
    return answer


def _read(file: str) -> str:
    try:
        return Path(file).read_text()
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
    name, _, hosts = item.partition("=")
    if not hosts:
        raise Failure("--secret wants a name and hosts: NAME=api.example.com.")
    if name not in os.environ:
        raise Failure(f"--secret {name} has no value: there is no variable {name} here.")
    return name, {"value": os.environ[name], "hosts": hosts.split(",")}


def _variable(item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not equals:
        if name not in os.environ:
            raise Failure(f"--env {name} has no value, and there is no variable {name} here.")
        value = os.environ[name]
    return name, value


if __name__ == "__main__":
    main()
