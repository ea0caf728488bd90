"""Headers of files over HTTP: types, ranges and conditional requests."""

from __future__ import annotations

import httpx

from tests.api.answers import refused
from tests.api.files_api import delete, get, names, put
from tests.conftest import MakeSession, Server
from tests.table import table


@table("name, kind", [
        ("a.html", "text/html"), ("a.svg", "image/svg+xml"), ("a.JSON", "application/json"), ("a.py", "text/x-python"),
        ("a.tar.gz", "application/gzip"), ("a.unknown", "application/octet-stream"), ("a", "application/octet-stream"),
        ("data:text,html", "application/octet-stream"),
    ])  # fmt: skip
def test_files_are_attachments_and_never_pages_of_this_server(
    client: httpx.Client, session: MakeSession, name: str, kind: str
) -> None:
    where = session()
    put(client, where, name, b"<script>alert(1)</script>")
    headers = get(client, where, name).headers
    assert headers["content-type"] == kind
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-disposition"].startswith("attachment;")
    assert "sandbox" in headers["content-security-policy"]
    assert headers["cross-origin-resource-policy"] == "same-origin"


def test_a_name_cannot_break_out_of_a_header(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    put(client, where, "a%0d%0aSet-Cookie:x=1%22;é.txt", b"1")
    answer = get(client, where, "a%0d%0aSet-Cookie:x=1%22;é.txt")
    assert answer.content == b"1"
    assert "set-cookie" not in answer.headers
    assert answer.headers["content-disposition"] == (
        "attachment; filename*=UTF-8''a%0D%0ASet-Cookie%3Ax%3D1%22%3B%C3%A9.txt"
    )


@table("wanted, part", [
        ("bytes=0-0", (0, 1)), ("bytes=2-5", (2, 6)), ("bytes=7-", (7, 10)), ("bytes=-3", (7, 10)),
        ("bytes=-30", (0, 10)), ("bytes=0-99", (0, 10)), ("bytes=9-9", (9, 10)),
        ("bytes=5-2", None), ("bytes=0-1,4-5", None), ("lines=1-2", None), ("bytes=-", None), ("bytes=a-b", None),
        ("", None),
    ])  # fmt: skip
def test_a_range_gives_a_part_of_the_file(
    client: httpx.Client, session: MakeSession, wanted: str, part: tuple[int, int] | None
) -> None:
    where = session()
    put(client, where, "a", b"0123456789")
    answer = get(client, where, "a", Range=wanted)
    if part is None:
        assert (answer.status_code, answer.content) == (200, b"0123456789")
        assert "content-range" not in answer.headers
    else:
        start, end = part
        assert (answer.status_code, answer.content) == (206, b"0123456789"[start:end])
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/10"
        assert answer.headers["content-length"] == str(end - start)


@table("wanted", ["bytes=10-", "bytes=99-100", "bytes=-0", f"bytes={10**17}-"])
def test_a_range_beyond_the_file_is_416(client: httpx.Client, session: MakeSession, wanted: str) -> None:
    where = session()
    put(client, where, "a", b"0123456789")
    put(client, where, "empty")
    answer = get(client, where, "a", Range=wanted)
    assert refused(answer, 416, "10 bytes")["code"] == "range_not_satisfiable"
    assert answer.headers["content-range"] == "bytes */10"
    assert get(client, where, "empty", Range="bytes=0-").headers["content-range"] == "bytes */0"


def test_a_range_of_a_changed_file_is_the_whole_file(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    etag = put(client, where, "a", b"0123456789").headers["etag"]
    assert get(client, where, "a", **{"Range": "bytes=1-2", "If-Range": etag}).status_code == 206
    assert get(client, where, "a", **{"Range": "bytes=1-2", "If-Range": '"else"'}).status_code == 200


def test_conditional_requests(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    old = put(client, where, "a", b"1").headers["etag"]
    for known in (old, f"W/{old}", f'"x", {old}', "*"):
        answer = get(client, where, "a", **{"If-None-Match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", old)
    assert get(client, where, "a", **{"If-None-Match": '"x"'}).status_code == 200

    new = put(client, where, "a", b"2", **{"If-Match": old}).headers["etag"]
    body = refused(put(client, where, "a", b"3", **{"If-Match": old}), 412, "If-Match")
    assert body["code"] == "precondition_failed"
    refused(put(client, where, "a", b"3", **{"If-Match": f"W/{new}"}), 412)
    refused(put(client, where, "a", b"3", **{"If-None-Match": "*"}), 412)
    refused(put(client, where, "b", b"3", **{"If-Match": "*"}), 412)
    refused(delete(client, where, "a", **{"If-Match": old}), 412)
    refused(put(client, where, "a", b"3", **{"If-Match": "unquoted"}), 400, "if-match")
    assert put(client, where, "b", b"3", **{"If-None-Match": "*"}).status_code == 200
    assert get(client, where, "a").content == b"2"
    assert delete(client, where, "a", **{"If-Match": new}).status_code == 200
    assert names(client, where) == ["b"]


def test_a_part_of_a_file_does_not_replace_it(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    put(client, where, "a", b"0123456789")
    link = client.post(f"/api/sessions/{where}/links", json={"path": "a", "method": "PUT"}).json()["url"]
    for url in (f"/api/sessions/{where}/files/a", f"/api/sessions/{where}/archive", link):
        part = client.put(url, content=b"789", headers={"Content-Range": "bytes 7-9/10"})
        assert refused(part, 400, "Content-Range")["code"] == "bad_request"
    assert get(client, where, "a").content == b"0123456789"


def test_what_a_condition_rules_out_is_not_stored(client: httpx.Client, server: Server, session: MakeSession) -> None:
    def stored() -> int:
        return sum(path.stat().st_size for path in (server.content_dir / "blobs").rglob("*") if path.is_file())

    where = session()
    put(client, where, "a", b"1")
    before = stored()
    for at in range(4):
        large = str(at).encode() * (5 << 20)
        refused(put(client, where, "a", large, **{"If-Match": '"else"'}), 412)
        refused(put(client, where, "a", large, **{"If-None-Match": "*"}), 412)
    assert stored() == before
