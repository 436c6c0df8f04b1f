"""Replies to repeated requests, on every store: one computes, the others wait or get the same answer."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, select

from polar_billing.access.replies import CLAIM_LIFETIME, KEPT, Replies
from polar_billing.errors import StoreLockedError
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.schema import reply_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.billing.access.conftest import Clock
    from tests.billing.conftest import JumpingClock

PRINT = "f" * 64


@pytest.fixture
def replies(store: Ledger, clock: Clock) -> Iterator[Replies]:
    made = Replies(store, clock=clock)
    yield made
    made.close()


@pytest.fixture
def others(store: Ledger, clock: Clock) -> Iterator[Replies]:
    """Another process."""
    made = Replies(store, clock=clock)
    yield made
    made.close()


@contextmanager
def cut_off(ledger: Ledger) -> Iterator[None]:
    """The database does not answer."""

    def locked() -> None:
        raise StoreLockedError("locked.")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ledger, "transaction", locked)
        yield


def test_one_claims_and_the_others_get_its_answer(replies: Replies) -> None:
    assert replies.claim("acme", "k", "f" * 64) == ("claimed", None)
    assert replies.claim("acme", "k", "f" * 64) == ("running", None)
    answer = bytes(range(256)) * 40
    replies.keep("acme", "k", answer)
    assert replies.claim("acme", "k", "f" * 64) == ("done", answer)
    assert replies.claim("acme", "k", "0" * 64) == ("other", None)
    assert replies.claim("globex", "k", "f" * 64) == ("claimed", None), "tenants do not share keys"


def test_replicas_of_a_service_share_keys_and_other_services_do_not(
    store: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, replica, other = Replies(store, source="chat"), Replies(store, source="chat"), Replies(store, source="search")
    one.claim("acme", "k", PRINT)
    one.keep("acme", "k", b"kept")
    assert replica.claim("acme", "k", PRINT) == ("done", b"kept")
    monkeypatch.setenv("POLAR_SOURCE", "chat")
    assert Replies(store).claim("acme", "k", PRINT) == ("done", b"kept")
    assert other.claim("acme", "k", PRINT) == ("claimed", None)
    other.close()
    one.close()


def test_what_was_given_up_may_be_tried_again(replies: Replies) -> None:
    replies.claim("acme", "k", "f" * 64)
    replies.give_up("acme", "k")
    assert replies.claim("acme", "k", "0" * 64) == ("claimed", None)
    replies.keep("acme", "k", b"kept")
    replies.give_up("acme", "k")  # an answer that is kept stays
    assert replies.claim("acme", "k", "0" * 64) == ("done", b"kept")


def test_answers_expire(replies: Replies, clock: Clock) -> None:
    replies.claim("acme", "k", PRINT)
    replies.keep("acme", "k", b"kept")
    clock.now += KEPT - timedelta(microseconds=1)
    assert replies.claim("acme", "k", PRINT) == ("done", b"kept")
    clock.now += timedelta(microseconds=1)
    assert replies.claim("acme", "k", PRINT) == ("claimed", None)


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


# --- Claims are leases. ---


def test_a_claim_lives_as_long_as_it_is_renewed(replies: Replies, others: Replies, clock: Clock) -> None:
    replies.claim("acme", "k", PRINT)
    for _ in range(30):  # of an answer that takes half an hour
        clock.now += 0.9 * CLAIM_LIFETIME
        assert others.claim("acme", "k", PRINT) == ("running", None)
        replies.renew()
    replies.keep("acme", "k", b"kept")
    assert others.claim("acme", "k", PRINT) == ("done", b"kept")


def test_the_claim_of_a_process_that_is_gone_expires(replies: Replies, others: Replies, clock: Clock) -> None:
    replies.claim("acme", "k", PRINT)
    clock.now += CLAIM_LIFETIME - timedelta(microseconds=1)
    assert others.claim("acme", "k", PRINT) == ("running", None)
    clock.now += timedelta(microseconds=1)
    assert others.claim("acme", "k", PRINT) == ("claimed", None)


def test_a_process_that_lives_answers_its_own_calls(replies: Replies, clock: Clock) -> None:
    """Whatever the database says of its claim."""
    replies.claim("acme", "k", PRINT)
    clock.now += CLAIM_LIFETIME
    assert replies.claim("acme", "k", PRINT) == ("running", None)
    assert replies.claim("acme", "k", "0" * 64) == ("other", None)


def test_a_claim_that_expired_is_made_again(replies: Replies, others: Replies, clock: Clock) -> None:
    """The database did not answer for a while, and the key of another call was claimed since."""
    replies.claim("acme", "k", PRINT)
    clock.now += 2 * CLAIM_LIFETIME
    assert others.claim("acme", "other", PRINT) == ("claimed", None)
    replies.renew()
    assert others.claim("acme", "k", PRINT) == ("running", None)
    clock.now += 0.9 * CLAIM_LIFETIME
    replies.renew()  # the new one, from now on
    clock.now += 0.9 * CLAIM_LIFETIME
    assert others.claim("acme", "k", PRINT) == ("running", None)
    replies.keep("acme", "k", b"kept")
    assert others.claim("acme", "k", PRINT) == ("done", b"kept")


@pytest.mark.parametrize("noticed", [True, False])
def test_of_two_answers_the_claimed_one_stays(
    replies: Replies, others: Replies, clock: Clock, *, noticed: bool
) -> None:
    """The first claim was lost: its process keeps nothing, and takes nothing from the second."""
    replies.claim("acme", "k", PRINT)
    clock.now += CLAIM_LIFETIME
    assert others.claim("acme", "k", PRINT) == ("claimed", None)
    if noticed:
        replies.renew()
        replies.give_up("acme", "k")
    else:
        replies.keep("acme", "k", b"late")
    assert replies.claim("acme", "k", PRINT) == ("running", None)
    others.keep("acme", "k", b"kept")
    assert replies.claim("acme", "k", PRINT) == ("done", b"kept")


def test_an_answer_waits_for_the_database(replies: Replies, others: Replies, clock: Clock) -> None:
    replies.claim("acme", "k", PRINT)
    with cut_off(replies.ledger):
        replies.keep("acme", "k", b"kept")
        assert replies.claim("acme", "k", PRINT) == ("done", b"kept"), "this process has it"
    assert others.claim("acme", "k", PRINT) == ("running", None)
    clock.now += 5 * CLAIM_LIFETIME  # nobody asked meanwhile
    replies.renew()
    assert others.claim("acme", "k", PRINT) == ("done", b"kept")
    with cut_off(replies.ledger):
        replies.renew()  # there is nothing left to do


def test_an_answer_is_kept_at_the_latest_when_the_server_ends(ledger: Ledger) -> None:
    replies, others = Replies(ledger), Replies(ledger)
    replies.claim("acme", "k", PRINT)
    with cut_off(ledger):
        replies.keep("acme", "k", b"kept")
    replies.close()
    assert others.claim("acme", "k", PRINT) == ("done", b"kept")
    assert not [thread for thread in threading.enumerate() if thread.name == "polar-claim"]


def test_a_claim_that_cannot_be_given_up_expires(replies: Replies, others: Replies, clock: Clock) -> None:
    replies.claim("acme", "k", PRINT)
    with cut_off(replies.ledger):
        replies.give_up("acme", "k")
    replies.renew()
    clock.now += CLAIM_LIFETIME
    assert others.claim("acme", "k", PRINT) == ("claimed", None)


def test_what_was_given_up_is_not_claimed_again_by_a_renewal(replies: Replies, store: Ledger) -> None:
    """The renewal had begun: it had read which claims there were."""
    replies.claim("acme", "k", PRINT)
    claims = list(replies._claims.values())
    replies.give_up("acme", "k")
    replies._store(claims)
    with store.snapshot() as connection:
        assert connection.execute(select(func.count()).select_from(reply_table)).scalar_one() == 0


def test_a_thread_renews_claims_until_there_are_none(store: Ledger, clock: Clock) -> None:
    replies, renewed = Replies(store, lifetime=timedelta(seconds=0.04), clock=clock), threading.Semaphore(0)
    write = replies._write

    def noting(connection: Any, claims: Any) -> Any:
        ended = write(connection, claims)
        renewed.release()
        return ended

    replies._write = noting  # type: ignore[method-assign]
    for name in ("a", "b"):
        replies.claim("acme", name, PRINT)
    for _ in range(3):
        assert renewed.acquire(timeout=60)
    threads = [thread for thread in threading.enumerate() if thread.name == "polar-claim"]
    assert len(threads) == 1
    for name in ("a", "b"):
        replies.give_up("acme", name)
    threads[0].join(timeout=60)
    assert not threads[0].is_alive()
    replies.claim("acme", "c", PRINT)
    while renewed.acquire(blocking=False):
        pass
    assert renewed.acquire(timeout=60), "another thread renews the next one"
    replies.close()


@pytest.mark.parametrize("jump", [timedelta(hours=25), timedelta(hours=-25)])
def test_a_clock_that_jumps_changes_nothing(store: Ledger, jump: timedelta, jumping: type[JumpingClock]) -> None:
    """Neither for a claim nor for an answer: the database's clock decides."""
    replies, others = Replies(store), Replies(store)
    replies.claim("acme", "k", PRINT)
    jumping.by += jump
    assert others.claim("acme", "k", PRINT) == ("running", None)
    replies.keep("acme", "k", b"kept")
    jumping.by += jump
    assert others.claim("acme", "k", PRINT) == ("done", b"kept")
    replies.close()


def test_after_a_boot_no_process_is_left_that_answers(ledger: Ledger, machine: dict[str, Any]) -> None:
    replies, others = Replies(ledger), Replies(ledger)
    replies.claim("acme", "lost", PRINT)
    replies.claim("acme", "k", PRINT)
    replies.keep("acme", "k", b"kept")
    machine.update(boot="second", since=7)
    assert others.claim("acme", "lost", PRINT) == ("claimed", None)
    assert others.claim("acme", "k", PRINT) == ("done", b"kept")
    replies.close()
    others.close()


def test_another_server_answers_for_one_that_was_killed(url: str) -> None:
    script = """
import sys, threading
from datetime import timedelta
from polar_billing.access.replies import Replies
replies = Replies(sys.argv[1], lifetime=timedelta(seconds=2))
print(replies.claim("acme", "k", "f" * 64)[0], flush=True)
threading.Event().wait()
"""
    with Ledger(url) as ledger, subprocess.Popen([sys.executable, "-c", script, url], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"claimed\n"
        server.send_signal(signal.SIGKILL)
        server.wait()
        others, found = Replies(ledger), "running"
        while found == "running":
            found, _ = others.claim("acme", "k", PRINT)
        assert found == "claimed"
        others.close()
