"""Whole projects with common packages: pushed, tested, run, and served."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.api.setups import make, settled
from tests.client.command import era
from tests.client.test_sync import write
from tests.conftest import MakeServer
from tests.packages.registry import serving

GO = {
    "go.mod": "module example.com/app\n\ngo 1.24\n\n"
    "require (\n\texample.com/colour v1.0.0\n\texample.com/words v1.0.0\n)\n",
    "internal/sign/sign.go": """\
package sign

import (
	"fmt"

	"example.com/colour"
	"example.com/words/title"
)

func Make(text string) string { return fmt.Sprintf("%s %s", colour.Red, title.Of(text)) }
""",
}
MAIN = """\
package main

import (
	"fmt"
	"os"

	"example.com/app/internal/sign"
)

func main() {
	fmt.Println(sign.Make(os.Getenv("TEXT")))
}
"""


def test_a_go_module_with_two_dependencies(
    own_server: MakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One dependency has a dependency of its own. The module proxy is gone by the time the program is built."""
    with serving() as registry:
        registry.put_go("example.com/base", {"base.go": "package base\n\nconst Mark = `!`\n"})
        registry.put_go("example.com/colour", {"colour.go": "package colour\n\nconst Red = `red`\n"})
        sub = 'package title\n\nimport (\n\t"strings"\n\n\t"example.com/base"\n)\n\n'
        sub += "func Of(text string) string { return strings.ToUpper(text) + base.Mark }\n"
        registry.put_go("example.com/words", {"title/title.go": sub}, requires=["example.com/base"])
        for name, value in registry.environment().items():
            monkeypatch.setenv(name, value)
        server = own_server()
        with server.client() as client:
            where = make(client, {"go": {"goMod": GO["go.mod"]}}, "go", default_timeout=120)
            found = settled(client, where)
    assert [name.rpartition("@")[0] for name in found["setup_result"]["go_modules"]] == [
        "example.com/base", "example.com/colour", "example.com/words",
    ]  # fmt: skip
    write(tmp_path / "project", **GO)
    era(server, "push", where, str(tmp_path / "project"), code=0)
    with server.client() as client:
        outcome = client.post(f"/api/sessions/{where}/run", json={"code": MAIN, "env": {"TEXT": "stop"}}).json()
        assert (outcome["stdout"], outcome["stderr"]) == ("red STOP!\n", ""), outcome
        assert {file["path"] for file in client.get(f"/api/sessions/{where}/files").json()["files"]} == set(GO)
