"""A server that was installed without IPython says so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from era import languages
from era.errors import BadRequest
from era.languages import ipython
from era.server import doctor
from era.settings import Settings
from tests.unit.core import Core


@pytest.fixture
def without_ipython(monkeypatch: pytest.MonkeyPatch) -> None:
    def packages() -> None:
        raise languages.Missing("The package ipython is not installed.", "On the server: pip install ipython")

    runtime = replace(languages.runtime("python"), kernel=None)
    monkeypatch.setattr(ipython, "packages", packages)
    real = languages.runtime
    monkeypatch.setattr(languages, "runtime", lambda name: runtime if name == "python" else real(name))


@pytest.mark.usefixtures("without_ipython")
async def test_contexts_say_what_is_missing(core: Core) -> None:
    session = await core.session()
    with pytest.raises(BadRequest) as refused:
        core.contexts.check_language(session)
    assert refused.value.code == "no_contexts"
    assert "ipython is not installed" in refused.value.message
    assert "pip install ipython" in refused.value.hint


@pytest.mark.usefixtures("without_ipython")
def test_the_doctor_says_what_is_missing() -> None:
    report = list(doctor.report({}, None, Settings()))
    at = report.index("missing  contexts in python: The package ipython is not installed.")
    assert report[at + 1] == "         to get it: On the server: pip install ipython"


def test_nothing_is_missing_here() -> None:
    assert languages.contexts_missing("python") is None
    assert languages.contexts_missing("node") is None
    assert not any("contexts" in line for line in doctor.report({}, None, Settings()))
