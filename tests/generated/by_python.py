"""Makes the calls with a client that openapi-python-client has made. Its interpreter runs this as a script, with the
directory above the client, the server's address and key, and the file of the calls; it prints a JSON line for each."""

from __future__ import annotations

import base64
import importlib
import inspect
import io
import json
import pkgutil
import sys
import typing
from pathlib import Path
from typing import Any

directory, address, key, calls = sys.argv[1:]
sys.path.insert(0, directory)
made = importlib.import_module("made")
kept: dict[str, Any] = {}


def filled(value: Any) -> Any:
    """A value with what was kept in the place of its `$NAME`s."""
    if isinstance(value, str) and value.startswith("$"):
        return kept[value[1:]]
    if isinstance(value, dict):
        return {name: filled(each) for name, each in value.items()}
    return [filled(each) for each in value] if isinstance(value, list) else value


def part(content: bytes, path: str) -> Any:
    """The part of an answer at a path. Of a link, only its token."""
    if not path:
        return content
    found = json.loads(content)
    for name in path.split("."):
        found = found[int(name) if isinstance(found, list) else name]
    return found.rpartition("/")[2] if path == "url" else found


def body_of(value: Any, function: Any) -> Any:
    """A body as the type that the call takes."""
    if "bytes" in value:
        content = value["bytes"]
        payload = content if isinstance(content, bytes) else base64.b64decode(content)
        return importlib.import_module("made.types").File(payload=io.BytesIO(payload))
    annotation = typing.get_type_hints(function)["body"]
    models = [each for each in typing.get_args(annotation) or (annotation,) if hasattr(each, "from_dict")]
    return models[0].from_dict(value)


modules = {
    name.rpartition(".")[2]: name
    for tag in pkgutil.iter_modules(importlib.import_module("made.api").__path__, "made.api.")
    for _, name, _ in pkgutil.iter_modules(importlib.import_module(tag.name).__path__, f"{tag.name}.")
}
with made.AuthenticatedClient(base_url=address, token=key, timeout=60) as client:
    for call in json.loads(Path(calls).read_text()):
        function = importlib.import_module(modules[call["operation"]]).sync_detailed
        takes = inspect.signature(function).parameters
        given = {name: value for name, value in filled(call["path"]).items() if name in takes} | call["query"]
        if call["body"] is not None:
            given["body"] = body_of(filled(call["body"]), function)
        answer = function(client=client, **given)
        typed = type(answer.parsed).__name__
        shown = answer.content[:300].decode(errors="replace")
        print(json.dumps([call["operation"], int(answer.status_code), typed, shown]), flush=True)
        kept |= {name: part(answer.content, path) for name, path in call["keep"].items()}
