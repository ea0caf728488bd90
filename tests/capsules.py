"""Capsules: taking them apart, changing them, and making them of parts, valid or not."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from typing import Any

type Parts = list[tuple[str, bytes]]

README = b"for people\n"


def digest(content: bytes) -> str:
    """The name of a blob of this content."""
    return hashlib.sha256(content).hexdigest()


def parts(capsule: bytes) -> Parts:
    """The files of a capsule, in order."""
    with tarfile.open(fileobj=io.BytesIO(capsule)) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def packed(files: Iterable[tuple[str, bytes]], change: Callable[[tarfile.TarInfo], None] = lambda _: None) -> bytes:
    """An archive of these files, in this order; `change` may change the header of each."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            change(member)
            tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return buffer.getvalue()


def tree(*entries: tuple[Any, ...]) -> bytes:
    """A tree object as ERA writes it, of these entries in this order."""
    return json.dumps(entries, separators=(",", ":")).encode()


def file(name: str, content: bytes, mode: int = 0o644, mtime: int = 10**18) -> tuple[Any, ...]:
    """The entry of a file in a tree object."""
    return ("file", name, digest(content), len(content), mode, mtime)


def directory(name: str, content: bytes, mode: int = 0o755) -> tuple[Any, ...]:
    """The entry of a directory in a tree object, whose own tree object is `content`."""
    return ("dir", name, digest(content), mode)


def session(**fields: Any) -> dict[str, Any]:
    """The session of a capsule.json, with these fields changed."""
    return {
        "id": "moved",
        "language": "python",
        "persistent": True,
        "metadata": {},
        "allowInternetAccess": True,
        "allowPublicAccess": True,
        "default_timeout": 30,
        "ttl": None,
        "code": None,
        "version": 1,
        "created_at": 1,
        "updated_at": 1,
        "last_run_at": None,
        **fields,
    }


def version(root: bytes | None = None, **fields: Any) -> dict[str, Any]:
    """A version of a capsule.json, with these fields changed; `root` is its tree object."""
    snapshot = None if root is None else digest(root)
    return {
        "version": 1,
        "created_at": 1,
        "cause": "create",
        "run_id": None,
        "snapshot": snapshot,
        "data": {},
        **fields,
    }


def run(**fields: Any) -> dict[str, Any]:
    """A run of a capsule.json, with these fields changed."""
    return {
        "id": "run_1_abc",
        "status": "ok",
        "started_at": 1,
        "ended_at": 2,
        "exit_code": 0,
        "duration_us": 1,
        "stdout_bytes": 0,
        "stderr_bytes": 0,
        "stdout_truncated": False,
        "stderr_truncated": False,
        "committed": True,
        "reason": None,
        "version": 1,
        "peak_memory_bytes": None,
        "cpu_us": None,
        "reaped": None,
        "enforced": {},
        "stdout": None,
        "stderr": None,
        **fields,
    }


def document(
    of: dict[str, Any] | None = None,
    versions: Iterable[Any] | None = None,
    runs: Iterable[Any] = (),
    **head: Any,
) -> bytes:
    """A capsule.json. Versions and runs may be text, which needn't be JSON."""

    def line(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    first = json.dumps({"format": 1, "era": "0", "exported_at": "", "session": of or session(), **head})[:-1] + ","
    listed = [",\n".join(map(line, items)) for items in ([version()] if versions is None else versions, runs)]
    before = [f"{text}\n" if text else "" for text in listed]
    return f'{first}\n"versions":[\n{before[0]}],\n"runs":[\n{before[1]}]}}\n'.encode()


def summed(of: bytes, readme: bytes = README) -> Parts:
    """The files at the start of a capsule: capsule.json, README.txt and their SHA256SUMS."""
    sums = f"{digest(of)}  capsule.json\n{digest(readme)}  README.txt\n".encode()
    return [("capsule.json", of), ("README.txt", readme), ("SHA256SUMS", sums)]


def objects(*contents: bytes) -> Parts:
    """The files of a capsule that are blobs."""
    return sorted({f"objects/{digest(content)}": content for content in contents}.items())


def capsule(of: bytes | None = None, *contents: bytes) -> bytes:
    """A capsule of this capsule.json and these blobs."""
    return packed([*summed(document() if of is None else of), *objects(*contents)])


def of_files(root: bytes, *contents: bytes) -> bytes:
    """A capsule of a session whose working directory is `root`."""
    return capsule(document(versions=[version(root)]), root, *contents)


def edited(whole: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The capsule with its capsule.json changed and its SHA256SUMS made anew."""
    files = parts(whole)
    return packed([*summed(change(files[0][1]), files[1][1]), *files[3:]])
