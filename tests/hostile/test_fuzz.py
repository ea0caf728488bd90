"""Bad requests made from the API's own description: the service answers in the contract's shape and never fails."""

from __future__ import annotations

import pytest

from tests.conftest import MakeServer
from tests.hostile.fuzz import Fuzz


def test_a_random_request_of_some_kinds_does_not_make_the_service_fail(own_server: MakeServer) -> None:
    """So many of them, not for so long: what is found doesn't depend on how busy the machine is. The next test tries
    those of each kind."""
    fuzz = Fuzz(own_server())  # it changes settings of the server, too
    fuzz.random_cases(number=1, examples=1, most=40)
    if fuzz.findings:
        pytest.fail(fuzz.report())


@pytest.mark.soak
def test_requests_from_the_description_succeed_or_are_refused(own_server: MakeServer) -> None:
    fuzz = Fuzz(own_server())
    fuzz.known_corners(most=2)
    fuzz.random_cases(number=1, examples=1)
    never = fuzz.never_succeeded(rounds=10, examples=25)
    if fuzz.findings:
        pytest.fail(fuzz.report())
    assert not never, fuzz.report()
