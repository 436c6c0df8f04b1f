"""Replies to repeated requests, on every store: one computes, the others wait or get the same answer."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from polar_billing.access.replies import CLAIMED, KEPT, Replies

if TYPE_CHECKING:
    from polar_billing.ledger.ledger import Ledger

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def replies(store: Ledger, clock: Clock) -> Replies:
    return Replies(store, clock=clock)


def test_one_claims_and_the_others_get_its_answer(replies: Replies) -> None:
    assert replies.claim("acme", "k", "f" * 64) == ("claimed", None)
    assert replies.claim("acme", "k", "f" * 64) == ("running", None)
    answer = bytes(range(256)) * 40
    replies.keep("acme", "k", answer)
    assert replies.claim("acme", "k", "f" * 64) == ("done", answer)
    assert replies.claim("acme", "k", "0" * 64) == ("other", None)


def test_tenants_do_not_share_keys(replies: Replies) -> None:
    replies.claim("acme", "k", "f" * 64)
    replies.keep("acme", "k", b"secret")
    assert replies.claim("globex", "k", "f" * 64) == ("claimed", None)


def test_what_was_given_up_may_be_tried_again(replies: Replies) -> None:
    replies.claim("acme", "k", "f" * 64)
    replies.give_up("acme", "k")
    assert replies.claim("acme", "k", "0" * 64) == ("claimed", None)
    replies.keep("acme", "k", b"kept")
    replies.give_up("acme", "k")  # an answer that is kept stays
    assert replies.claim("acme", "k", "0" * 64) == ("done", b"kept")


def test_claims_and_answers_expire(replies: Replies, clock: Clock) -> None:
    replies.claim("acme", "k", "f" * 64)
    clock.now = NOON + CLAIMED
    assert replies.claim("acme", "k", "f" * 64) == ("claimed", None)
    replies.keep("acme", "k", b"kept")
    clock.now += KEPT - timedelta(microseconds=1)
    assert replies.claim("acme", "k", "f" * 64) == ("done", b"kept")
    clock.now += timedelta(microseconds=1)
    assert replies.claim("acme", "k", "f" * 64) == ("claimed", None)


def test_of_many_at_once_one_claims(replies: Replies) -> None:
    together, found = threading.Barrier(6), []

    def claim() -> None:
        together.wait()
        found.append(replies.claim("acme", "k", "f" * 64)[0])

    threads = [threading.Thread(target=claim) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["claimed", *["running"] * 5]
