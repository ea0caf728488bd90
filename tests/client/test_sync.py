"""`era push` and `era pull`: whole directories into a session and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from era.sdk.directories import Directory, files
from era.sdk.errors import LocalError
from tests.client.command import era
from tests.conftest import Server, eventually


def sync(server: Server, *arguments: str, code: int = 0) -> str:
    """Push or pull. Returns what the command prints, of a failure the errors only."""
    done = era(server, *arguments, code=code)
    return done.stderr if code else done.stdout + done.stderr


def write(top: Path, /, **contents: str) -> None:
    for name, content in contents.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def listed(client: httpx.Client) -> set[str]:
    return {file["path"] for file in client.get("/api/sessions/app/files").json()["files"]}


@pytest.fixture
def make(client: httpx.Client) -> Any:
    return lambda language: client.post("/api/sessions", json={"language": language, "session_id": "app"})


def version(client: httpx.Client) -> int:
    number: int = client.get("/api/sessions/app").json()["version"]
    return number


def test_a_python_package(server: Server, client: httpx.Client, make: Any, tmp_path: Path) -> None:
    make("python")
    write(
        tmp_path,
        **{
            "main.py": "from shop.prices import total\nimport shop\nprint(total([1, 2]), shop.__name__)\n",
            "shop/__init__.py": "",
            "shop/prices.py": "from .tax import WITH\n\ndef total(items): return sum(items) * WITH\n",
            "shop/tax.py": "WITH = 2\n",
        },
    )
    assert "4 files pushed" in sync(server, "push", "app", str(tmp_path))
    assert version(client) == 2, "one version for all of it"
    for _ in range(2):
        output = client.post("/api/sessions/app/run", json={"code": "import main"}).json()
        assert (output["stdout"], output["stderr"]) == ("6 shop\n", "")
    before = version(client)
    assert "0 files pushed" in sync(server, "push", "app", str(tmp_path))
    assert version(client) == before
    write(tmp_path, **{"shop/tax.py": "WITH = 3\n"})
    assert "1 files pushed, 0 deleted, 4 in all" in sync(server, "push", "app", str(tmp_path))
    assert client.post("/api/sessions/app/run", json={"code": "import main"}).json()["stdout"] == "9 shop\n"


def test_a_typescript_project(server: Server, client: httpx.Client, make: Any, tmp_path: Path) -> None:
    make("typescript")
    write(
        tmp_path,
        **{
            "package.json": '{"name": "app", "type": "module"}',
            "src/index.ts": "import { area, type Shape } from './shapes/area.ts';\n"
            "console.log(area({ a: 6, b: 7 } as Shape));\n",
            "src/shapes/area.ts": "export interface Shape { a: number; b: number }\n"
            "export const area = ({ a, b }: Shape): number => a * b;\n",
        },
    )
    sync(server, "push", "app", str(tmp_path))
    output = client.post("/api/sessions/app/run", json={"code": 'require("./src/index.ts")'}).json()
    assert (output["stdout"], output["stderr"]) == ("42\n", "")


def test_ignored_files_are_not_pushed(server: Server, client: httpx.Client, make: Any, tmp_path: Path) -> None:
    make("python")
    outside = tmp_path / "outside"
    write(outside, secret="s")
    top = tmp_path / "top"
    kept = {".gitignore", "keep.log", "a.py", "sub/.gitignore", "sub/loud.log", "sub/top"}
    left = {"x.log", "build/out", "sub/build/out", "top", ".git/config", "sub/quiet.txt"}
    write(top, **dict.fromkeys(kept | left, "x"))
    write(top, **{".gitignore": "*.log\n!keep.log\nbuild/\n/top\n", "sub/.gitignore": "!loud.log\nquiet.txt\n"})
    (top / "link").symlink_to(outside / "secret")
    (top / "linked").symlink_to(outside)
    sync(server, "push", "app", str(top))
    assert listed(client) == kept


def test_each_name_of_a_file_is_pushed_as_a_file(
    server: Server, client: httpx.Client, make: Any, tmp_path: Path
) -> None:
    """As package managers leave many: an archive with hard links is refused as a whole."""
    make("python")
    write(tmp_path, one="x")
    (tmp_path / "other").hardlink_to(tmp_path / "one")
    assert "2 files pushed" in sync(server, "push", "app", str(tmp_path))
    assert [client.get(f"/api/sessions/app/files/{name}").text for name in ("one", "other")] == ["x", "x"]


def test_deleting(server: Server, client: httpx.Client, make: Any, tmp_path: Path) -> None:
    make("python")
    write(tmp_path / "one", **{"a": "1", "b/c": "2"})
    sync(server, "push", "app", str(tmp_path / "one"))
    client.post("/api/sessions/app/run", json={"code": "open('made', 'w').write('3')"})
    assert "0 files pushed, 0 deleted" in sync(server, "push", "app", str(tmp_path / "one"))
    two = tmp_path / "two"
    assert "3 files pulled, 0 deleted" in sync(server, "pull", "app", str(two))
    assert "0 files pulled, 0 deleted" in sync(server, "pull", "app", str(two))
    assert {str(path.relative_to(two)): path.read_text() for path in two.rglob("*") if path.is_file()} == {
        "a": "1",
        "b/c": "2",
        "made": "3",
    }
    write(two, **{".gitignore": "mine", "mine": "m", "b/extra": "x"})
    assert "0 files pulled, 0 deleted" in sync(server, "pull", "app", str(two))
    assert "0 files pulled, 2 deleted" in sync(server, "pull", "app", str(two), "--delete")
    assert {path.name for path in two.rglob("*") if path.is_file()} == {"a", "c", "made", "mine"}
    assert "0 files pushed, 1 deleted" in sync(server, "push", "app", str(tmp_path / "one"), "--delete")
    assert listed(client) == {"a", "b/c"}


def test_deleting_leaves_what_git_has_in_the_session(
    server: Server, client: httpx.Client, make: Any, tmp_path: Path
) -> None:
    """A directory's own `.git` isn't pushed, so that its absence means nothing; and some names can't be named."""
    make("python")
    code = "import os\nos.mkdir('.git')\n"
    code += "for name in (b'.git/HEAD', b'odd\\xff', b'surplus'): open(name, 'w').write('x')"
    assert client.post("/api/sessions/app/run", json={"code": code}).json()["exit_code"] == 0
    write(tmp_path, a="1")
    output = sync(server, "push", "app", str(tmp_path), "--delete")
    assert "1 files pushed, 1 deleted, 1 in all" in output
    assert "2 files of the session's git or with names that aren't UTF-8 were not deleted" in output
    assert listed(client) == {".git/HEAD", "a", "odd\ufffd"}


def test_a_pull_stays_in_its_directory(server: Server, client: httpx.Client, make: Any, tmp_path: Path) -> None:
    """Whatever is there already, and whatever the session made."""
    make("python")
    code = "import os\nos.makedirs('d')\nos.symlink('/etc', 'l')\n"
    code += "for name in ('d/f', 'g'): open(name, 'w').write('new')"
    assert client.post("/api/sessions/app/run", json={"code": code}).json()["exit_code"] == 0
    outside, top = tmp_path / "outside", tmp_path / "top"
    write(outside, f="old", g="old")
    top.mkdir()
    (top / "d").symlink_to(outside)
    (top / "g").symlink_to(outside / "g")
    output = sync(server, "pull", "app", str(top), code=2)
    assert "d/f can't be written" in output
    (top / "d").unlink()
    output = sync(server, "pull", "app", str(top))
    assert "2 files pulled" in output or "1 files pulled" in output
    assert "1 links" in output
    assert ((top / "d/f").read_text(), (top / "g").read_text()) == ("new", "new")
    assert not (top / "g").is_symlink()
    assert not (top / "l").exists()
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"f": "old", "g": "old"}


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "a//x", "", ".", "..", "a/\0"])
def test_paths_that_lead_elsewhere_are_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "top").mkdir()
    with Directory(tmp_path / "top") as directory, pytest.raises(LocalError), directory.writing(path, None) as put:
        put(b"x")
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == []


def test_a_broken_download_leaves_the_old_file(tmp_path: Path) -> None:
    def pieces() -> Any:
        yield b"half"
        raise httpx.ReadError("gone")

    write(tmp_path, f="old")
    with Directory(tmp_path) as directory, pytest.raises(httpx.ReadError), directory.writing("f", None) as put:
        any(put(piece) for piece in pieces())
    assert list(files(tmp_path)) == ["f"]
    assert (tmp_path / "f").read_text() == "old"


def test_a_pull_writes_nothing_that_is_gits(server: Server, client: httpx.Client, make: Any, tmp_path: Path) -> None:
    """Its settings name programs that git runs, on the machine of whoever pulls."""
    make("python")
    code = "import os\nfor name in ('.git', 'sub/.GIT', 'sub/deep/.git'):\n    os.makedirs(name)\n"
    code += "    open(name + '/config', 'w').write('theirs')\nopen('sub/.gitignore', 'w').write('x')\nopen('b', 'w')"
    assert client.post("/api/sessions/app/run", json={"code": code}).json()["exit_code"] == 0
    write(tmp_path, **{".git/config": "mine"})
    output = sync(server, "pull", "app", str(tmp_path), "--delete")
    assert "2 files pulled, 0 deleted, 2 in all" in output
    assert "3 links" in output
    there = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert there == {".git/config": "mine", "sub/.gitignore": "x", "b": ""}


def test_a_pull_brings_large_files_of_a_live_session(server: Server, client: httpx.Client, tmp_path: Path) -> None:
    """Their digests aren't known before they are read. Those that its programs may not read are left out."""
    client.post("/api/sessions", json={"language": "python", "session_id": "app", "limits": {"disk_mb": 64}})
    command = "echo x > closed; chmod 0 closed; sleep 600"
    client.post("/api/sessions/app/processes", json={"command": ["sh", "-c", command]}).raise_for_status()
    client.put("/api/sessions/app/files/large", content=bytes((16 << 20) + 1)).raise_for_status()
    client.put("/api/sessions/app/files/small", content=b"x").raise_for_status()
    stat = "/api/sessions/app/stat"
    eventually(lambda: client.get(f"{stat}/closed").json().get("mode") == "0000")
    assert client.get(f"{stat}/large").json()["etag"] is None
    for there in ("missing", "other"):
        output = sync(server, "pull", "app", str(tmp_path))
        assert "files pulled, 0 deleted, 2 in all" in output
        assert "1 links" in output
        assert (tmp_path / "large").stat().st_size == (16 << 20) + 1, there
        (tmp_path / "large").write_text("other")
