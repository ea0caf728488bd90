"""The steps of scenarios as calls of the `era` command, with --json."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.client.command import environment
from tests.conftest import ERA, Server
from tests.sdk.scenarios import Refused, bytes_of, shown

_OUTCOMES = {"run", "stream"}
"""Calls whose exit code is the program's."""


class Command:
    """Does steps by the command, against one server."""

    def __init__(self, server: Server, place: Path) -> None:
        self._server = server
        self._place = place

    def take(self, call: str, on: str | None, args: dict[str, Any]) -> Any:
        """Do a step; what comes of it. Raises Refused."""
        return STEPS[call](self, on or "", args)

    def era(self, *words: object, stdin: bytes = b"", fails: bool = False) -> bytes:
        """Run the command; its output. Raises Refused if it says so. `fails`: it may leave with another code than 0."""
        done = subprocess.run(
            [ERA, *map(str, words)], input=stdin, capture_output=True, env=environment(self._server), timeout=60
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        if done.returncode == 2 and done.stderr.startswith(b"{"):
            raise Refused(json.loads(done.stderr)["code"])
        assert fails or done.returncode == 0, done.stderr.decode()
        return done.stdout

    def json(self, *words: object, stdin: bytes = b"", fails: bool = False) -> Any:
        output = self.era(*words, "--json", stdin=stdin, fails=fails)
        return json.loads(output) if output else None

    def ended(self, *words: object, stdin: bytes = b"") -> dict[str, Any]:
        """Run the command, which prints what a program writes and leaves with its exit code."""
        environ = environment(self._server)
        done = subprocess.run([ERA, *map(str, words)], input=stdin, capture_output=True, env=environ, timeout=60)
        assert done.stderr == b"", done.stderr.decode()
        return {"stdout": done.stdout.decode(), "exit_code": done.returncode}

    def file(self, content: str | bytes) -> Path:
        with tempfile.NamedTemporaryFile(dir=self._place, delete=False) as file:
            file.write(content.encode() if isinstance(content, str) else content)
        return Path(file.name)


def settings(args: dict[str, Any]) -> list[str]:
    words = [f"--metadata={name}={value}" for name, value in args.get("metadata", {}).items()]
    words += [f"--{name}={json.dumps(args[name])}" for name in ("data", "setup") if name in args]
    words += [f"--record-code={'on' if args['record_code'] else 'off'}"] if "record_code" in args else []
    return words + ([f"--timeout={args['default_timeout']}"] if "default_timeout" in args else [])


def run(era: Command, on: str, args: dict[str, Any], *extra: str) -> Any:
    words = [f"--env={name}={value}" for name, value in args.get("env", {}).items()]
    words += [f"--{name}={args[name]}" for name in ("timeout", "cwd") if name in args]
    words += ["--atomic"] if args.get("atomic") else []
    words += ["--no-record-code"] if args.get("record_code") is False else []
    if "stdin" in args:
        words += ["--stdin", str(era.file(args["stdin"]))]
    if "command" in args:
        command = [args["command"]] if isinstance(args["command"], str) else args["command"]
        return json.loads(era.era("exec", on, *words, *extra, "--json", "--", *command, fails=True))
    if "code" not in args:
        return era.json("sessions", "run", on, fails=True)
    words += [f"--context={args['context']}"] if "context" in args else []
    program = [era.file(args["code"]), *args.get("args", [])]
    return json.loads(era.era("run", "-s", on, *extra, "--json", *words, *program, fails=True))


def once(era: Command, args: dict[str, Any], *extra: str) -> list[object]:
    files = [f"--file={name}={era.file(content)}" for name, content in args.get("files", {}).items()]
    return ["run", "--once", f"--language={args['language']}", *files, *extra, era.file(args["code"])]


def execute(era: Command, _: str, args: dict[str, Any]) -> Any:
    return json.loads(era.era(*once(era, args, "--json"), fails=True))


def execute_stream(era: Command, _: str, args: dict[str, Any]) -> Any:
    """What it prints as it comes; the rest isn't printed."""
    done = subprocess.run(
        [ERA, *map(str, once(era, args))],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(era._server),
        timeout=60,
        text=True,
    )
    return {"stdout": done.stdout, "stderr": done.stderr, "exit_code": done.returncode}


def stream(era: Command, on: str, args: dict[str, Any]) -> Any:
    """Output as it comes, and the rest from the run's record."""
    file = era.file(args["code"])
    done = subprocess.run(
        [ERA, "run", "-s", on, file],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(era._server),
        timeout=60,
        text=True,
    )
    record = era.json("runs", "list", on, "-n", "1")["runs"][0]
    data = era.json("sessions", "get", on)["data"]
    return {**record, "stdout": done.stdout, "stderr": done.stderr, "exit_code": done.returncode, "data": data}


def delete(era: Command, on: str, args: dict[str, Any]) -> Any:
    return era.json("sessions", "delete", on)


def create(era: Command, _: str, args: dict[str, Any]) -> Any:
    id = [args["session_id"]] if "session_id" in args else []
    return era.json("sessions", "create", args["language"], *id, *settings(args))


def list_sessions(era: Command, _: str, args: dict[str, Any]) -> Any:
    language = [f"--language={args['language']}"] if "language" in args else []
    return era.json("sessions", "list", *language, *settings({"metadata": args["metadata"]}))


def read(era: Command, on: str, args: dict[str, Any]) -> Any:
    """Bytes come as they are, and errors only then as JSON when that is asked for."""
    target = era._place / "read"
    era.json("files", "read", on, args["path"], "-o", target)
    return shown(target.read_bytes())


def write(era: Command, on: str, args: dict[str, Any]) -> Any:
    return era.json("files", "write", on, args["path"], era.file(bytes_of(args["content"])))


def move(era: Command, on: str, args: dict[str, Any]) -> Any:
    capsule = era._place / "capsule.tar"
    era.json("export", on, "-o", capsule)
    return era.json("import", capsule, "--id", args["id"])


def copy(era: Command, on: str, args: dict[str, Any]) -> Any:
    return era.json("sessions", "copy", on, "--id", args["id"], "--from-version", args["from_version"])


def set_code(era: Command, on: str, args: dict[str, Any]) -> Any:
    return era.json("sessions", "code", on, era.file(args["code"]), "--description", args["description"])


def kv_set(era: Command, _: str, args: dict[str, Any]) -> Any:
    metadata = ["--metadata", json.dumps(args["metadata"])]
    return era.json("storage", "kv", "set", args["namespace"], args["key"], args["value"], *metadata)


def kv_list(era: Command, _: str, args: dict[str, Any]) -> Any:
    return era.json("storage", "kv", "list", args["namespace"], "--prefix", args["prefix"])


def d1(what: str) -> Step:
    def call(era: Command, _: str, args: dict[str, Any]) -> Any:
        return era.json("storage", "d1", what, args["namespace"], args["sql"], *args.get("params", []))

    return call


def r2_put(era: Command, _: str, args: dict[str, Any]) -> Any:
    return era.json("storage", "r2", "put", args["namespace"], args["key"], era.file(bytes_of(args["content"])))


def start(era: Command, on: str, args: dict[str, Any]) -> Any:
    words = ["--tag", args["tag"]] if "tag" in args else []
    words += ["--interactive"] if args.get("stdin") else []
    command = [args["command"]] if isinstance(args["command"], str) else args["command"]
    return json.loads(era.era("exec", on, "--process", *words, "--json", "--", *command))


def process_output(era: Command, on: str, args: dict[str, Any]) -> Any:
    return era.ended("logs", "-f", on, args["process"])


def talk(era: Command, on: str, args: dict[str, Any]) -> Any:
    return era.ended("shell", on, "--process", args["process"], stdin=args["input"].encode())


def output(era: Command, on: str, args: dict[str, Any]) -> Any:
    return shown(era.era("runs", "output", on, args["run_id"]))


def simple(*words: str) -> Step:
    """A call whose arguments are all words, in their order."""

    def call(era: Command, on: str, args: dict[str, Any]) -> Any:
        return era.json(*words, on, *args.values(), fails=True)

    return call


def stored(*words: str) -> Step:
    """The value of a key, of which the command says that it isn't there."""

    def call(era: Command, _: str, args: dict[str, Any]) -> Any:
        try:
            return era.json(*words, *args.values())
        except Refused as problem:
            if problem.code != "not_found":
                raise
            return None

    return call


def keyed(*words: str) -> Step:
    def call(era: Command, _: str, args: dict[str, Any]) -> Any:
        return era.json(*words, *args.values())

    return call


type Step = Callable[[Command, str, dict[str, Any]], Any]
STEPS: dict[str, Step] = {
    "sessions.create": create,
    "sessions.get": simple("sessions", "get"),
    "sessions.list": list_sessions,
    "sessions.update": lambda era, on, args: era.json("sessions", "update", on, *settings(args)),
    "sessions.delete": delete,
    "sessions.restore": simple("sessions", "restore"),
    "run": run,
    "stream": stream,
    "execute": execute,
    "execute.stream": execute_stream,
    "background": lambda era, on, args: run(era, on, args, "--background"),
    "data.get": simple("sessions", "data"),
    "data.all": simple("sessions", "data"),
    "data.set": lambda era, on, args: era.json("sessions", "data", on, args["key"], json.dumps(args["value"])),
    "data.delete": lambda era, on, args: era.json("sessions", "data", on, args["key"], "--delete"),
    "code.get": simple("sessions", "code"),
    "code.set": set_code,
    "files.write": write,
    "files.read": read,
    "files.list": simple("files", "list"),
    "files.delete": simple("files", "rm"),
    "versions.list": simple("versions", "list"),
    "versions.get": simple("versions", "get"),
    "versions.diff": simple("versions", "diff"),
    "rollback": lambda era, on, args: era.json(
        "versions", "rollback", on, args["version"], *(["--stop"] if args.get("stop") else [])
    ),
    "duplicate": copy,
    "runs.list": simple("runs", "list"),
    "runs.get": simple("runs", "get"),
    "runs.wait": simple("runs", "wait"),
    "runs.stop": simple("runs", "stop"),
    "runs.output": output,
    "setup.wait": simple("setup"),
    "processes.start": start,
    "processes.list": simple("ps"),
    "processes.signal": lambda era, on, args: era.json("kill", on, args["process"], "--signal", args["signal"]),
    "processes.output": process_output,
    "processes.talk": talk,
    "processes.stop": simple("kill"),
    "checkpoint": simple("checkpoint"),
    "sessions.stop": simple("stop"),
    "cell": run,
    "contexts.list": simple("contexts", "list"),
    "contexts.interrupt": simple("contexts", "interrupt"),
    "contexts.restart": simple("contexts", "restart"),
    "contexts.delete": simple("contexts", "delete"),
    "host": lambda era, on, args: era.json("url", "--proxy", on, args["port"]),
    "inbox.get": simple("inbox", "get"),
    "inbox.set": lambda era, on, args: era.json("inbox", "set", on, "--retries", args["retries"]),
    "inbox.deliveries": simple("inbox", "list"),
    "inbox.delete": simple("inbox", "delete"),
    "move": move,
    "webhooks.create": lambda era, _, args: era.json(
        "webhooks", "create", args["url"], *(f"--event={event}" for event in args["events"])
    ),
    "webhooks.deliveries": lambda era, _, args: era.json("webhooks", "deliveries", args["id"])["deliveries"],
    "webhooks.replay": lambda era, _, args: era.json("webhooks", "replay", args["id"], args["delivery_id"]),
    "webhooks.delete": lambda era, _, args: era.json("webhooks", "delete", args["id"]),
    "audit": lambda era, _, args: era.json("audit", args["target"])["entries"],
    "kv.set": kv_set,
    "kv.get": stored("storage", "kv", "get"),
    "kv.list": kv_list,
    "kv.delete": keyed("storage", "kv", "delete"),
    "d1.exec": d1("exec"),
    "d1.query": d1("query"),
    "r2.put": r2_put,
    "r2.get": stored("storage", "r2", "get"),
    "r2.list": keyed("storage", "r2", "list"),
}
