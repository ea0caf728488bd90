"""What tools say where there are no such packages, told from what another try may get."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from era.core.setup.package_sets import SetupFailed
from era.packages import tools
from era.packages.processes import Ran
from tests.packages.lab import Lab
from tests.packages.registry import Registry, put_evil_npm, wheel

GONE = "http://127.0.0.1:9"
NOWHERE = {"UV_DEFAULT_INDEX": f"{GONE}/simple", "npm_config_registry": f"{GONE}/npm/", "GOPROXY": f"{GONE}/go"}
"""A registry that nobody reaches."""

SETUPS: dict[str, dict[str, Any]] = {
    "no version": {"pip": ["one==7"]},
    "no package": {"pip": ["nothing"]},
    "no file": {"pip": ["lost"]},
    "no way together": {"pip": ["one", "one==7"]},
    "no version of npm": {"npm": ["evil@7.0.0"]},
    "no package of npm": {"npm": ["nothing"]},
    "no module": {"go": ["example.com/nothing@v1.0.0"]},
    "no version of a module": {"go": ["example.com/greet@v7.0.0"]},
}


@pytest.mark.parametrize("kind", SETUPS)
def test_whether_there_are_no_such_packages(lab: Lab, registry: Registry, kind: str) -> None:
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))
    registry.put_python("lost", "lost-1.0-py3-none-any.whl", wheel("lost", {"lost.py": "x = 1"}))
    del registry.pages["/files/lost-1.0-py3-none-any.whl"]
    registry.put_go("example.com/greet", {"greet.go": "package greet"})
    put_evil_npm(registry, {})
    with pytest.raises(SetupFailed) as caught:
        lab.make(**SETUPS[kind])
    assert caught.value.no_such, str(caught.value)


@pytest.mark.parametrize("kind", ["no version", "no version of npm", "no module"])
def test_who_is_not_reached_may_have_them(lab: Lab, kind: str) -> None:
    variables = {**lab.installer._variables, **NOWHERE}
    with patch.object(lab.installer, "_variables", variables), pytest.raises(SetupFailed) as caught:
        lab.make(**SETUPS[kind])
    assert not caught.value.no_such, str(caught.value)


@pytest.mark.parametrize(
    ("said", "no_such"),
    [
        ("Because one==1.0 has no wheels with a matching platform tag, one==1.0 cannot be used.", True),
        ("Failed to fetch: `…`\nHTTP status server error (503 Service Unavailable)", False),
        ("Because one was not found in the package registry …\nhint: An index could not be queried", False),
        (
            "Failed to build `one==1`\nFailed to resolve requirements from `build-system.requires`\n"
            "Failed to fetch: `…`\nHTTP status server error (502 Bad Gateway) for url (…)",
            False,
        ),
        ("Failed to build `one==1`\nThe build backend returned an error", True),
        ("failed to write to the cache: No space left on device (os error 28)", False),
    ],
)
def test_what_a_registry_says_that_has_no_time(said: str, no_such: bool) -> None:
    assert tools.no_such(Ran(1, "", said)) == no_such
