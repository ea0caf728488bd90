"""Links: URLs by which one file is read or written without a key, and what they must not do."""

from __future__ import annotations

import base64
from typing import Any

import httpx

from era.core.files import links
from era.wire.files import FileWrittenAnswer, LinkAnswer
from tests.api.answers import checked, refused
from tests.api.files_api import get, put
from tests.api.owners import OPERATOR_KEY, Owners, client_with_key, new_key
from tests.conftest import MakeServer, MakeSession, Server, eventually

KEYS = {"url", "path", "method", "expires_at"}


def link(client: httpx.Client, where: str, path: str, **more: Any) -> str:
    """The URL of a new link."""
    answer = client.post(f"/api/sessions/{where}/links", json={"path": path, **more})
    url: str = checked(answer, LinkAnswer, KEYS, 201)["url"]
    return url


def test_a_link_reads_one_file_as_an_attachment(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    put(client, where, "page.html", b"<script>alert(1)</script>")
    url = link(client, where, "page.html")
    with httpx.Client(timeout=60) as anybody:
        answer = anybody.get(url, headers={"Origin": "https://elsewhere.example"})
        assert (answer.status_code, answer.content) == (200, b"<script>alert(1)</script>")
        assert answer.headers["content-disposition"].startswith("attachment")
        assert answer.headers["content-security-policy"] == "sandbox; default-src 'none'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["access-control-allow-origin"] == "*"
        part = anybody.get(url, headers={"Range": "bytes=1-6"})
        assert (part.status_code, part.content) == (206, b"script")
        assert anybody.head(url).headers["content-length"] == "25"
        refused(anybody.put(url, content=b"x"), 404)
        refused(anybody.post(url), 405)
        put(client, where, "page.html", b"new")
        assert anybody.get(url).content == b"new", "it leads to the file as it is now"
        client.delete(f"/api/sessions/{where}/files/page.html")
        refused(anybody.get(url), 404)


def test_a_link_writes_one_file_of_bounded_size(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    url = link(client, where, "up/load.bin", method="PUT", max_bytes=10)
    with httpx.Client(timeout=60) as anybody:
        asked = anybody.options(url, headers={"Origin": "https://a.example", "Access-Control-Request-Method": "PUT"})
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (204, "*")
        assert "PUT" in asked.headers["access-control-allow-methods"]
        written = anybody.put(url, content=b"0123456789", headers={"Origin": "https://a.example"})
        assert checked(written, FileWrittenAnswer, {"path", "size"}) == {"path": "up/load.bin", "size": 10}
        refused(anybody.put(url, content=b"0123456789A"), 413, "10 bytes")
        refused(anybody.put(url, content=iter([b"01234", b"56789A"])), 413, "10 bytes")
        refused(anybody.get(url), 404)
    assert get(client, where, "up/load.bin").content == b"0123456789"


def test_nothing_of_a_token_can_be_changed(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    put(client, where, "a", b"a")
    put(client, where, "b", b"b")
    base, _, token = link(client, where, "a").rpartition("/")
    content = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    with httpx.Client(timeout=60) as anybody:
        for at in range(len(content)):
            changed = bytearray(content)
            changed[at] ^= 1
            text = base64.urlsafe_b64encode(changed).decode().rstrip("=")
            assert anybody.get(f"{base}/{text}").status_code == 404
        other = content.replace(b'"a"', b'"b"')
        assert other != content
        refused(anybody.get(f"{base}/{base64.urlsafe_b64encode(other).decode().rstrip('=')}"), 404)
        for bad in ("x", token[:-1], token + "A", token + "=", token + "%0a", "A" * 5000, "%ff", "x" * 30):
            refused(anybody.get(f"{base}/{bad}"), 404)


def test_an_expired_link_is_gone_and_bad_fields_are_refused(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    put(client, where, "a", b"a")
    url = link(client, where, "a", expires_in=0.2)
    with httpx.Client(timeout=60) as anybody:
        assert eventually(lambda: anybody.get(url).status_code == 410)
        assert refused(anybody.get(url), 410)["code"] == "link_expired"
    for bad in ({"expires_in": 0}, {"expires_in": links.MAX_SECONDS + 1}, {"method": "DELETE"}, {"path": "../x"},
                {"path": ""}, {"path": ".session_data.json"}, {"max_bytes": -1}, {"expires": 3}):  # fmt: skip
        refused(client.post(f"/api/sessions/{where}/links", json={"path": "a", **bad}), 400)


def test_a_link_dies_with_its_key(owners: Owners) -> None:
    with client_with_key(owners.server, OPERATOR_KEY) as operator:
        made = new_key(owners.server, "links")
        with client_with_key(owners.server, made["key"]) as client, httpx.Client(timeout=60) as anybody:
            client.post("/api/sessions", json={"language": "python", "session_id": "linked"})
            put(client, "linked", "a", b"a")
            url = link(client, "linked", "a")
            assert anybody.get(url).content == b"a"
            assert operator.delete(f"/api/keys/{made['id']}").is_success
            refused(anybody.get(url), 404)
    with client_with_key(owners.server, new_key(owners.server, "links")["key"]) as client:
        client.delete("/api/sessions/linked?purge=true")


def test_a_link_ends_with_the_secret_that_it_was_made_with(owners: Owners) -> None:
    """Whoever has an old secret during its time of grace makes nothing with it that outlives it."""
    operator, made = owners.operator, new_key(owners.server, "links")
    rotate = f"/api/keys/{made['id']}/rotate"
    with client_with_key(owners.server, made["key"]) as client, httpx.Client(timeout=60) as anybody:
        client.post("/api/sessions", json={"language": "python", "session_id": "linked"})
        put(client, "linked", "a", b"a")
        urls = [link(client, "linked", "a")]
        second = operator.post(rotate, json={"grace_seconds": 3600}).json()["key"]
        urls.append(link(client, "linked", "a"))
        assert [anybody.get(url).content for url in urls] == [b"a", b"a"]
        with client_with_key(owners.server, second) as fresh:
            lasting = link(fresh, "linked", "a")
            operator.post(rotate, json={"grace_seconds": 3600})  # which ends the first secret
            for url in urls:
                refused(anybody.get(url), 404)
            assert anybody.get(lasting).content == b"a"
            fresh.delete("/api/sessions/linked?purge=true")


def test_links_outlive_a_restart_but_not_another_operator_key(own_server: MakeServer) -> None:
    server = own_server(api_key="first")
    with client_with_key(server, "first") as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        put(client, "s", "a", b"a")
        token = link(client, "s", "a").rpartition("/")[2]
    server.stop()
    server.start()
    assert httpx.get(f"{server.url}/links/{token}", timeout=60).content == b"a"
    (server.content_dir / "blobs").rename(server.content_dir / "away")
    (server.content_dir / "blobs").mkdir()
    assert httpx.get(f"{server.url}/links/{token}", timeout=60).status_code == 503
    (server.content_dir / "blobs").rmdir()
    (server.content_dir / "away").rename(server.content_dir / "blobs")
    server.stop()
    server.settings["ERA_API_KEY"] = "second"
    server.start()
    refused(httpx.get(f"{server.url}/links/{token}", timeout=60), 404)
    assert "request_failed" in server.log + server.log_of_calls
    assert token not in server.log + server.log_of_calls, "who reads the log can't use it"
    if server.content_dir == server.data_dir:  # else the key is made of the cluster's secret
        assert (server.data_dir / "link-key").stat().st_mode & 0o077 == 0


def test_forging_a_link_needs_the_key(own_server: MakeServer) -> None:
    """The same token is refused, and let in where the comparison is taken out."""
    server = own_server()
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "s"})
        put(client, "s", "a", b"a")
        put(client, "s", "b", b"canary")
        url = link(client, "s", "a")
    token = url.rpartition("/")[2]
    content = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).replace(b'"a"', b'"b"')
    forged = base64.urlsafe_b64encode(content).decode().rstrip("=")
    refused(httpx.get(f"{server.url}/links/{forged}", timeout=60), 404)
    server.stop()
    weakness = "import hmac; hmac.compare_digest = lambda a, b: True"
    weak = Server(server.data_dir, server.settings, weakness=weakness)
    weak.start()
    try:
        assert httpx.get(f"{weak.url}/links/{forged}", timeout=60).content == b"canary"
    finally:
        weak.stop()
