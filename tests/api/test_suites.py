"""The tests of well-known packages, in a session and outside as an ordinary user: each goes the same.

They are fetched from the registries that pip, uv and npm of this machine use, and where a package of npm comes without
its tests (express, commander), from Debian's source package of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import httpx
import pytest

from tests.api.suites import RESULT, NodeSuite, PythonSuite, Suite, inside, outside
from tests.api.test_plain_machine import DIFFERENT

pytestmark = pytest.mark.soak

SUITES: dict[str, Suite] = {
    "attrs": PythonSuite("attrs==26.1.0 pytest hypothesis cloudpickle pympler pytest-xdist"),
    "click": PythonSuite("click==8.5.1 pytest"),
    "flask": PythonSuite("flask==3.1.3 pytest<9 python-dotenv asgiref"),
    "jinja2": PythonSuite("jinja2==3.1.6 pytest trio"),
    "requests": PythonSuite("requests==2.34.2 pysocks pytest pytest-httpbin pytest-mock trustme httpbin"),
    "numpy": PythonSuite("numpy pytest hypothesis", "-m 'not slow' --pyargs numpy.lib numpy.linalg", has_source=False),
    "express": NodeSuite(
        "express@4.18.2 mocha@10.0.0 supertest@6.3.0 after@0.8.2 connect-redis@3.4.2 cookie-parser@1.4.6"
        " cookie-session@2.0.0 ejs@3.1.8 express-session@1.17.2 hbs@4.2.0 marked@0.7.0 method-override@3.0.0"
        " morgan@1.10.0 multiparty@4.2.3 pbkdf2-password@1.2.1 vhost@3.0.2",
        f"mocha --require test/support/env --reporter xunit --reporter-option output={RESULT} --check-leaks"
        " test/ test/acceptance/",
        debian="bookworm",
    ),
    "commander": NodeSuite(
        "commander@9.4.1 jest@28.1.3 jest-junit@16.0.0 ts-jest@28.0.8 typescript@4.9.5 @types/jest@28.1.8"
        " @types/node@16.18.126",
        f"JEST_JUNIT_OUTPUT_NAME={RESULT} jest --coverage=false --reporters=jest-junit",
        debian="trixie",
    ),
    "zod": NodeSuite(
        "zod@4.6.7 vitest@4.1.12 esbuild@0.28.2 @web-std/file@3.0.3 @seriousme/openapi-schema-validator@2.11.0",
        # The one left out searches regular expressions for a minute, which is the same work anywhere.
        f"vitest run --reporter=junit --outputFile={RESULT} --exclude '**/redos.test.ts'",
    ),
}

_TIMEOUTS = ("test_connect_timeout", "test_total_timeout_connect")
KNOWN = {
    "tests.test_format::test_large_file_support": "The size of a file",
    # They connect to a private address, which is closed, and so fails at once.
    **{
        f"tests.test_requests.TestTimeout::{name}[timeout{at}]": "Kinds of sockets"
        for name in _TIMEOUTS
        for at in (0, 1)
    },
}
"""Tests that go differently, and the entry of the list in `docs/languages.md` that says why."""


@pytest.mark.parametrize("name", SUITES)
def test_they_go_as_outside(client: httpx.Client, host_directory: Path, name: str) -> None:
    suite = SUITES[name]
    if isinstance(suite, NodeSuite) and suite.debian and shutil.which("apt-get") is None:
        pytest.skip("its tests are in a source package of Debian's, which apt-get fetches")
    expected = outside(host_directory, suite)
    assert sum(not outcome for outcome in expected.values()) > 50, "next to nothing was tested"
    for _ in range(3):  # some depend on how busy the machine is
        found = inside(client, host_directory, suite)
        differ = {
            each for each in expected.keys() | found.keys() if expected.get(each) != found.get(each)
        } - KNOWN.keys()
        if not differ:
            break
    assert {each: (expected.get(each), found.get(each)) for each in differ} == {}


def test_what_goes_differently_is_listed() -> None:
    assert set(KNOWN.values()) <= DIFFERENT.keys()
