"""Bad requests made from the API's own description: the service answers in the contract's shape and never fails."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import MakeServer
from tests.hostile.fuzz import Fuzz

SOAK_SECONDS = 75.0  # a round
SOAK_ROUNDS = 4


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


@pytest.mark.soak
@pytest.mark.parametrize("round_", range(SOAK_ROUNDS))
def test_minutes_of_concurrent_requests_never_make_the_service_fail(own_server: MakeServer, round_: int) -> None:
    """Several at a time, so that sessions are deleted, changed and run at once; with new random numbers each time."""
    fuzz = Fuzz(own_server(), SOAK_SECONDS)
    first = random.SystemRandom().randrange(1 << 30)
    print(f"round {round_}, numbers from {first}")

    def search(worker: int) -> None:
        number = first + 10_000 * worker
        while not fuzz.over:
            if worker == 0:
                fuzz.known_corners()
            fuzz.random_cases(number, examples=25)
            number += 1

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(search, range(3)))
    print(fuzz.report())
    if fuzz.findings:
        pytest.fail(fuzz.report())
