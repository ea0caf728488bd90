"""Archives made for tests, and calls that send and fetch them."""

from __future__ import annotations

import io
import tarfile
import zipfile
from typing import Any

import httpx

from era.wire.files import ArchiveAnswer
from tests.api.answers import checked

KEYS = {"success", "count", "total_count", "total_size_bytes"}
MTIME = 1_700_000_000


def fetch(client: httpx.Client, where: str, form: str = "tar") -> bytes:
    """Fetch a session's files as an archive of this format."""
    answer = client.get(f"/api/sessions/{where}/archive", params={"format": form})
    assert answer.status_code == 200, answer.text
    kind = {"tar": "application/x-tar", "tar.gz": "application/gzip", "zip": "application/zip"}[form]
    assert answer.headers["content-type"] == kind
    assert answer.headers["content-disposition"] == f'attachment; filename="{where}.{form}"'
    return answer.content


def send(client: httpx.Client, where: str, archive: bytes, query: str = "", **headers: str) -> httpx.Response:
    """Send an archive into a session."""
    return client.put(f"/api/sessions/{where}/archive{query}", content=archive, headers=headers)


def send_accepted(client: httpx.Client, where: str, archive: bytes, query: str = "") -> dict[str, Any]:
    """Send an archive that must be accepted; returns the body of the answer."""
    return checked(send(client, where, archive, query), ArchiveAnswer, KEYS)


def member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A member for `tar`: its header, with these fields changed, and its content."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(content), MTIME
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar(*members: tuple[tarfile.TarInfo, bytes], mode: str = "w", form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar archive of these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=form) as archive:  # type: ignore[call-overload]  # mode is no literal
        for info, content in members:
            archive.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return buffer.getvalue()


def zipped(*members: tuple[str, bytes, int], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip archive of these members, each a name, content and mode."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content, mode in members:
            info = zipfile.ZipInfo(name, (2023, 11, 14, 22, 13, 20))
            info.create_system, info.external_attr, info.compress_type = 3, mode << 16, method
            archive.writestr(info, content)
    return buffer.getvalue()


FORMS = ["tar", "tar.gz", "zip"]
SYM = {"type": tarfile.SYMTYPE}
