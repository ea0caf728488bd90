"""Lists of the files of a session that has more of them than one answer lists."""

from __future__ import annotations

import httpx

from tests.api.answers import refused
from tests.api.archives_api import SYM, member, send_accepted, tar
from tests.api.files_api import delete, listed
from tests.conftest import MakeSession

MOST = 10_000


def test_list_in_the_session_is_refused_above_ten_thousand_files(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    send_accepted(client, where, tar(*(member(f"f{number}") for number in range(MOST + 1))))
    assert delete(client, where, "f0").status_code == 200
    paths = {2: f"/api/sessions/{where}/versions/2", 3: f"/api/sessions/{where}"}
    many, few = (client.get(path, params={"include": "files"}) for path in paths.values())
    assert refused(many, 413)["code"] == "too_large"
    assert "GET /api/sessions/{id}/versions/{number}/files lists them in pages" in many.json()["hint"]
    assert few.status_code == 200
    assert len(few.json()["files"]) == MOST

    send_accepted(client, where, tar(member("link", linkname="f1", **SYM)))
    many = client.get(paths[3], params={"include": "files"})
    assert refused(many, 413)["error"] == "There are 10001 files, more than the 10000 that one answer lists."
    assert "GET /api/sessions/{id}/files lists them in pages" in many.json()["hint"]
    page = listed(client, where, limit=1000)
    assert len(page["files"]) == 1000
    assert page["next_cursor"]
    assert client.get(paths[3]).status_code == 200
