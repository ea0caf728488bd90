"""Tickets: good once, for one session, for a moment, and not too many."""

from __future__ import annotations

import pytest

from era.core.owners import api_keys as module
from era.core.owners.api_keys import Caller, Tickets
from era.errors import TooBusy

CALLER = Caller("lovelace")


def test_a_ticket_is_good_once_and_for_one_session() -> None:
    tickets = Tickets()
    ticket = tickets.give(CALLER, "hers")
    assert tickets.take("guess", "hers") is None
    assert tickets.take(ticket, "hers") == CALLER
    assert tickets.take(ticket, "hers") is None
    ticket = tickets.give(CALLER, "hers")
    assert tickets.take(ticket, "another") is None
    assert tickets.take(ticket, "hers") is None, "it was tried"


def test_a_ticket_grows_old(monkeypatch: pytest.MonkeyPatch) -> None:
    tickets = Tickets()
    monkeypatch.setattr(module, "TICKET_SECONDS", -1)
    assert tickets.take(tickets.give(CALLER, "hers"), "hers") is None


def test_an_owner_has_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    tickets = Tickets()
    for _ in range(256):
        tickets.give(CALLER, "hers")
    with pytest.raises(TooBusy):
        tickets.give(CALLER, "hers")
    assert tickets.take(tickets.give(Caller("other"), "theirs"), "theirs") == Caller("other")
