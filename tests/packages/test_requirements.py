"""Requests for packages: names and versions, and nothing that leads anywhere else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from era.core.setup.requirements import MAX_PACKAGES, MAX_TEXT, Packages, can_be_setup, packages_of, setup_text
from era.errors import BadRequest


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("requests", ["requests"]),
        ("requests beautifulsoup4 lxml>=5", ["beautifulsoup4", "lxml>=5", "requests"]),
        ("requests\nidna\n\n", ["idna", "requests"]),
        ("requests >= 2.0 , < 3   idna", ["idna", "requests>=2.0,<3"]),
        ("# all of it\nsix==1.17.0  # the last one\r\nidna", ["idna", "six==1.17.0"]),
        ("uvicorn[standard]>=0.30 requests [socks, security]", ["requests[socks,security]", "uvicorn[standard]>=0.30"]),
        ("tomli>=2; python_version < '3.11'", ["tomli>=2 ; python_version < '3.11'"]),
        ("a~=1.0 b===1.0-x c!=1.* d==1!2.0+local", ["a~=1.0", "b===1.0-x", "c!=1.*", "d==1!2.0+local"]),
        ("", []),
    ],
)
def test_requirements(text: str, found: list[str]) -> None:
    assert packages_of({"pip": {"requirements": text}}) == Packages(pip=tuple(found))
    assert packages_of({"pip": text.splitlines()}) == Packages(pip=tuple(found))
    assert packages_of({"pip": text}) == Packages(pip=tuple(found))


@pytest.mark.parametrize(
    "item",
    [
        "-r other.txt", "--index-url=http://evil", "-e .", "-f /tmp", "--hash=sha256:00", "--pre",
        "./six", "../six", "/etc/passwd", "C:\\six", "six.whl/..", "file:///etc", "git+https://host/x", "x@git+ssh://h/x",
        "six @ file:///tmp/six.whl", "six@https://host/six.whl", "http://host/six.tar.gz", "${HOME}", "six\\", "six==",
        "six>>1", "six; x\nidna", "six idna; python_version > '3'", "six; python_version > '3' --pre", "six; a@b",
        "-", ".", "_", "six-", "s!x", "six[", "six[a", "sïx", "six\0", "a" * 301, "six==" + "1" * 400,
    ],
)  # fmt: skip
def test_what_is_no_requirement(item: str) -> None:
    for setup in ({"pip": [item]}, {"pip": {"requirements": item}}):
        if item == "six; x\nidna":
            continue  # two lines, the second of which is fine and the first odd but a marker
        with pytest.raises(BadRequest, match="setup"):
            packages_of(setup)


@pytest.mark.parametrize(
    ("item", "found"),
    [
        ("ms", ("ms", "*")),
        ("ms@2.1.3", ("ms", "2.1.3")),
        ("ms@^2", ("ms", "^2")),
        ("@types/node", ("@types/node", "*")),
        ("@types/node@>=20 <30 || 31.x", ("@types/node", ">=20 <30 || 31.x")),
        ("lodash@latest", ("lodash", "latest")),
        ("JSONStream", ("JSONStream", "*")),
    ],
)
def test_npm_packages(item: str, found: tuple[str, str]) -> None:
    assert packages_of({"npm": [item]}) == Packages(npm=(found,))
    text = json.dumps({"dependencies": dict([found]), "scripts": {"postinstall": "rm -rf /"}})
    assert packages_of({"npm": {"packageJson": text}}) == Packages(npm=(found,))


@pytest.mark.parametrize(
    "item",
    [
        "", "@", "@/x", "@types/", "-g", "--prefix=/", "../ms", "./ms", "/etc", "ms/..", ".bin", "_x", "a b",
        "ms@file:../x", "ms@http://host/x.tgz", "ms@https://host/x", "ms@git+ssh://host/x", "ms@github:a/b", "ms@a/b",
        "x@npm:evil@1", "ms@~/x", "ms@link:/x", "ms@workspace:*", "node_modules", "é", "ms\0", "a" * 215,
    ],
)  # fmt: skip
def test_what_is_no_npm_package(item: str) -> None:
    with pytest.raises(BadRequest, match="setup"):
        packages_of({"npm": [item]})


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"dependencies": []}', '{"dependencies": {"a": 1}}', '{"dependencies": {"a": "file:x"}}',
     '{"devDependencies": {"../a": "1"}}', '{"dependencies": {"a": "1"}, "optionalDependencies": {"b": "http://x"}}'],
)  # fmt: skip
def test_what_is_no_package_json(text: str) -> None:
    with pytest.raises(BadRequest, match="setup"):
        packages_of({"npm": {"packageJson": text}})


def test_all_dependencies_of_a_package_json_count() -> None:
    package = {"dependencies": {"a": "1"}, "devDependencies": {"a": "2", "b": "2"}, "optionalDependencies": {"c": "*"}}
    found = packages_of({"npm": {"packageJson": json.dumps(package)}})
    assert found.npm == (("a", "1"), ("b", "2"), ("c", "*"))


def test_bounds() -> None:
    assert len(packages_of({"pip": [f"p{n}" for n in range(MAX_PACKAGES)]}).pip) == MAX_PACKAGES
    for setup in ({"pip": [f"p{n}" for n in range(MAX_PACKAGES + 1)]}, {"npm": [f"p{n}" for n in range(1000)]}):
        with pytest.raises(BadRequest, match="at most 200"):
            packages_of(setup)
    with pytest.raises(BadRequest, match="characters"):
        packages_of({"pip": {"requirements": "#" * (1 << 20)}})


@pytest.mark.parametrize("kind", ["pip", "npm", "go"])
def test_a_list_is_as_long_as_a_text_at_most(kind: str) -> None:
    item = {"pip": "a", "npm": "a", "go": "a.b/c"}[kind]
    most = (MAX_TEXT + 1) // (len(item) + 1)
    assert packages_of({kind: [item] * most}) == packages_of({kind: item})
    with pytest.raises(BadRequest, match="characters in all"):
        packages_of({kind: [item] * (most + 1)})


@pytest.mark.parametrize("kind", ["pip", "npm", "go"])
@pytest.mark.parametrize("join", [list, " ".join], ids=["list", "text"])
def test_what_comes_after_too_many_packages_is_not_looked_at(kind: str, join: Callable[[list[str]], object]) -> None:
    end = ".x/y" if kind == "go" else ""
    with pytest.raises(BadRequest, match="at most 200"):
        packages_of({kind: join([*(f"p{n}{end}" for n in range(MAX_PACKAGES + 1)), "../no/package"])})


def test_a_run_of_blanks_takes_time_in_proportion_to_its_length() -> None:
    """It took the square: ten minutes for these."""
    blanks = " " * (MAX_TEXT - 10)
    assert packages_of({"pip": f"a{blanks}b"}).pip == ("a", "b")
    assert packages_of({"pip": [f"a{blanks}>=1"]}).pip == ("a>=1",)
    assert packages_of({"pip": {"requirements": f"a[b{blanks}]"}}).pip == ("a[b]",)


def test_the_last_mention_of_a_name_counts() -> None:
    assert packages_of({"npm": ["a@1", "a@2", "a@1"]}).npm == (("a", "1"),)
    assert packages_of({"go": "a.b/c@v1.0.0 a.b/c@v2.0.0 a.b/c@v1.0.0"}).go == (("a.b/c", "v1.0.0"),)


@pytest.mark.parametrize(
    ("setup", "can"),
    [
        ({"pip": ["six"], "npm": {"packageJson": '{"dependencies": {"ms": "2"}}'}, "envs": {"A": "1"}}, True),
        ({"pip": {"requirements": "six"}}, True),
        ({}, False),
        ([], False),
        ({"pip": ["-e ."]}, False),
        ({"pip": [1]}, False),
        ({"pip": {"requirements": 1}}, False),
        ({"pip": {"packageJson": "{}"}}, False),
        ({"pip": "six"}, True),
        ({"pip": 6}, False),
        ({"commands": ["ls"]}, True),
        ({"commands": "ls"}, False),
        ({"commands": [1]}, False),
        ({"commands": [" "]}, False),
        ({"commands": ["a\0"]}, False),
        ({"commands": ["\ud800"]}, False),
        ({"commands": ["true"] * 51}, False),
        ({"go": ["x"]}, False),
        ({"envs": {"A=B": "1"}}, False),
        ({"envs": {"A": 1}}, False),
        ({"envs": {"A": "1\0"}}, False),
        ({"envs": {"A": "x" * (2 << 20)}}, False),
    ],
)
def test_what_a_capsule_may_ask_for(setup: Any, can: bool) -> None:
    assert can_be_setup(setup) is can


def test_a_setup_of_nothing_is_none() -> None:
    assert setup_text({"pip": [], "npm": None, "go": [], "envs": {}}) is None


GO_MOD = """
module example.com/app // mine

go 1.24
toolchain go1.25.1

require rsc.io/quote v1.5.2
require (
    golang.org/x/text v0.14.0 // indirect
    "github.com/Azure/go-autorest/v14" v14.2.0+incompatible
)
"""


def test_go_modules() -> None:
    listed = [
        "rsc.io/quote@v1.5.2",
        "golang.org/x/text@v0.14.0",
        "github.com/Azure/go-autorest/v14@v14.2.0+incompatible",
    ]
    found = (
        ("github.com/Azure/go-autorest/v14", "v14.2.0+incompatible"),
        ("golang.org/x/text", "v0.14.0"),
        ("rsc.io/quote", "v1.5.2"),
    )
    assert packages_of({"go": listed}) == packages_of({"go": {"goMod": GO_MOD}}) == Packages(go=found)
    assert packages_of({"go": ["rsc.io/quote", "rsc.io/quote/v3@latest"]}).go == (
        ("rsc.io/quote", "latest"),
        ("rsc.io/quote/v3", "latest"),
    )
    assert can_be_setup({"go": {"goMod": GO_MOD}})


@pytest.mark.parametrize(
    "item",
    [
        *("", "-x", "-modfile=/etc/passwd", "./here", "/tmp/x", "../x", "rsc.io/../x", "http://host/x", "fmt", "all"),
        *("rsc.io/quote@main", "rsc.io/quote@v1;x", "rsc.io/quote@none", "rsc.io/a b", "rsc.io/quote@>=v1"),
    ],
)
def test_what_is_no_go_module(item: str) -> None:
    with pytest.raises(BadRequest, match=r"setup\.go"):
        packages_of({"go": [item]})


@pytest.mark.parametrize(
    "line", ["replace a.b/c => ../c", "exclude a.b/c v1.0.0", "replace (", "require a.b/c", "what"]
)
def test_what_of_a_go_mod_can_t_be_followed(line: str) -> None:
    with pytest.raises(BadRequest, match=r"setup\.go"):
        packages_of({"go": {"goMod": f"module x.y/z\n{line}\n a.b/c => ../c\n"}})
