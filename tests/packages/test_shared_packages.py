"""Package sets in sandboxes, with every driver and in every language, and the rights of the tools that fetch them."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile

import pytest

from era.drivers import guest
from era.packages import tools
from tests.drivers.sandboxes import Options, Sandboxes, Weakness
from tests.gvisor import BOTH_KINDS, needs_gvisor
from tests.packages.lab import Lab, assert_sound, run_in_a_sandbox
from tests.packages.registry import Registry, put_evil_npm, wheel

WRITE = "open('/opt/env/lib/python%d.%d/site-packages/one.py' % __import__('sys').version_info[:2], 'w').write('x = 2')"


def writable(options: Options) -> Options:
    at = max(number for number, option in enumerate(options) if option == "/opt/env")
    return [*options[: at - 2], "--bind", *options[at - 1 :]]


@pytest.mark.parametrize("weak", [False, True], ids=["sound", "weak"])
def test_programs_cannot_change_what_they_share(lab: Lab, registry: Registry, weak: bool) -> None:
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))
    made = lab.make(pip=["one"])
    (file,) = (lab.directory / "environments" / made.digest).glob("python/lib/*/site-packages/one.py")
    weakness = None
    if weak:
        file.chmod(0o666)
        no_landlock = {'landlock.restrict(config["landlock"])': "None"}
        weakness = Weakness(options=writable, supervisor=no_landlock)
    result = run_in_a_sandbox(lab, made, WRITE, weakness)
    assert (file.read_text() == "x = 2") is weak, result


@pytest.mark.parametrize("driver", ["bubblewrap", pytest.param("gvisor", marks=needs_gvisor)])
def test_every_driver_shows_packages(lab: Lab, registry: Registry, driver: str) -> None:
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))
    put_evil_npm(registry, {})
    made = lab.make(pip=["one"], npm=["evil"])
    sandboxes = Sandboxes(lab.directory, Weakness(), driver, self_tested=())
    try:
        for language, code, said in (
            ("python", "import one; print(one.x); open(one.__file__, 'a')", "1\n"),
            ("node", "import e from 'evil'; console.log(e, require('evil'))", "1 1\n"),
            ("typescript", "import e from 'evil'; const a: number = e; console.log(a)", "1\n"),
        ):
            sandbox = sandboxes._runner.run(sandboxes.driver.create(language, sandboxes.driver.limits, made.digest))
            result = sandboxes.run(sandbox, code)
            sandboxes.close(sandbox)
            assert result.stdout == said, result
            assert (result.ended.exit_code == 0) is (language != "python"), "nothing of it can be written"
    finally:
        sandboxes.stop()


def test_tools_get_no_secrets_and_no_rights(lab: Lab, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test replaces a tool by a program that reports what it was started with."""
    monkeypatch.setenv("ERA_API_KEY", "secret")
    seen = "import json, os; print(json.dumps([dict(os.environ), os.getuid(), os.getgroups(), os.listdir('.')]))"
    seen += f"; print(open('/proc/self/status').read(), os.access({str(lab.directory)!r}, os.R_OK))"
    monkeypatch.setattr(tools, "pip_command", lambda *_: [guest.PYTHON, "-I", "-c", seen])
    made = lab.make(pip=["one"])
    result, status = made.stdout.split("\n", 1)
    environment, uid, groups, _ = json.loads(result)
    assert not [name for name in environment if name.startswith(("ERA_", "AWS_"))]
    assert environment["UV_DEFAULT_INDEX"] == f"{registry.url}/simple"
    assert "NoNewPrivs:\t1" in status
    if os.getuid() == 0:
        assert uid > 1_000_000
        assert groups == []
        assert re.search(r"CapEff:\t0+\n", status)
        assert status.rstrip().endswith("False"), "the data directory is closed to it"


# -- Go's modules ---------------------------------------------------------------------------------------------------

GREETS = 'package main\n\nimport "example.com/greet/sub"\n\nfunc main() { println(sub.To("you")) }\n'
GREET = {
    "sub/greet.go": 'package sub\n\nimport "example.com/base"\n\nfunc To(n string) string { return base.Word + n }\n'
}


def put_modules(registry: Registry) -> None:
    registry.put_go("example.com/base", {"base.go": 'package base\n\nconst Word = "hello "\n'})
    registry.put_go("example.com/greet", GREET, requires=["example.com/base"])


@pytest.mark.parametrize("driver", BOTH_KINDS)
def test_modules_come_with_all_they_need(lab: Lab, registry: Registry, driver: str) -> None:
    put_modules(registry)
    made = lab.make(go=["example.com/greet"])
    assert_sound(lab, made)
    assert [f"{item['name']}@{item['version']}" for item in made.go] == [
        "example.com/base@v1.0.0",
        "example.com/greet@v1.0.0",
    ]
    asked = len(registry.asked)
    assert lab.make(go=["example.com/greet"]) == made
    assert len(registry.asked) == asked
    assert lab.make(go={"goMod": "module x.y/z\n\nrequire example.com/greet v1.0.0\n"}).digest == made.digest
    sandboxes = Sandboxes(lab.directory, Weakness(), driver, self_tested=())
    try:
        sandbox = sandboxes._runner.run(sandboxes.driver.create("go", sandboxes.driver.limits, made.digest))
        result = sandboxes.run(sandbox, GREETS, timeout=120)
        assert (result.stderr, result.ended.exit_code) == ("hello you\n", 0)
        # A go.mod of the session's own, which needs no go.sum for what is installed, and stays as it is.
        own = b"module example.com/app\n\ngo 1.24\n\nrequire example.com/greet v1.0.0\n"
        result = sandboxes.run(sandbox, GREETS, files={"go.mod": own}, timeout=120)
        assert (result.stderr, result.ended.exit_code) == ("hello you\n", 0)
        assert {path.name: path.read_bytes() for path in sandbox.workspace.glob("go.*")} == {"go.mod": own}
        result = sandboxes.run(sandbox, GREETS.replace("example.com/greet/sub", "example.com/other"), timeout=120)
        assert result.ended.exit_code == 1
        assert "example.com/other" in result.stderr
        sandboxes.close(sandbox)
    finally:
        sandboxes.stop()


def test_modules_that_are_not_there(lab: Lab, registry: Registry) -> None:
    put_modules(registry)
    assert "There is no such package" in lab.failure(go=["example.com/nothing"])
    assert "There is no such package" in lab.failure(go=["example.com/greet@v1.9.9"])


def test_a_module_that_lies_about_its_content(lab: Lab, registry: Registry) -> None:
    """Names in a module's archive can't lead out of it, and only plain files are unpacked."""
    put_modules(registry)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr("example.com/greet@v1.0.0/../../../../escaped", "x")
    registry.pages["/go/example.com/greet/@v/v1.0.0.zip"] = written.getvalue()
    assert "go failed" in lab.failure(go=["example.com/greet"])
    assert list(lab.directory.rglob("escaped")) == []
