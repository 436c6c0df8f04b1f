"""API keys on every store, and their limits over replicas: a secret is never stored, no limit is exceeded."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, select, text

from polar_billing.access.keys import ApiKey, ApiKeys
from polar_billing.access.rates import LIFETIME, Rates
from polar_billing.errors import AccessError, StoreLockedError
from polar_billing.ledger.records import ALL_TENANTS
from polar_billing.ledger.schema import running_table
from polar_billing.proof.verify import verify_ledger
from tests.billing.storing import NOON

if TYPE_CHECKING:
    from polar_billing.ledger.ledger import Ledger
    from tests.billing.access.conftest import Clock


@pytest.fixture
def keys(store: Ledger, clock: Clock) -> ApiKeys:
    return ApiKeys(store, clock=clock)


def test_a_key_is_found_with_all_that_it_is_bound_to(keys: ApiKeys) -> None:
    bounds: dict[str, Any] = {
        "tags": {"team": "sö 'x'", "user": "ann"},
        "scopes": ("infer", "usage:read"),
        "models": ("tiny", "tiny:economy"),
        "tiers": ("economy",),
        "max_tokens": 5,
        "requests_per_minute": 60,
        "tokens_per_minute": 10_000,
        "parallel": 2,
    }
    made, _ = keys.create("acme", "search", expires_in=timedelta(days=90), **bounds)
    found = keys.find(made.key_id)
    assert found == made
    assert found is not None
    assert {name: getattr(found, name) for name in bounds} == bounds
    assert found.expires_at == NOON + timedelta(days=90)
    assert keys.find("nothing0") is None


def test_the_secret_is_not_stored(keys: ApiKeys, store: Ledger) -> None:
    made, shown = keys.create("acme", "search")
    prefix, key_id, secret = shown.split("_", 2)
    assert (prefix, key_id) == ("pk", made.key_id)
    assert len(secret) == 43
    assert made.secret_hash == hashlib.sha256(secret.encode()).hexdigest()
    with store.snapshot() as connection:
        (row,) = connection.execute(text("SELECT * FROM polar_api_key")).all()
    assert not any(secret in str(value) for value in row)


def test_a_revoked_key_stays_on_record(keys: ApiKeys) -> None:
    made, _ = keys.create("acme", "search")
    keys.revoke(made.key_id)
    found = keys.find(made.key_id)
    assert found is not None
    assert found.state(NOON) == "revoked"
    with pytest.raises(AccessError, match="revoked"):
        keys.rotate(made.key_id, timedelta())


def test_rotation_leaves_both_good_for_a_while(keys: ApiKeys, clock: Clock) -> None:
    old, old_text = keys.create("acme", "search", max_tokens=7, tags={"team": "a"})
    new, new_text = keys.rotate(old.key_id, timedelta(hours=24))
    assert new_text != old_text
    assert (new.rotated_from, new.max_tokens, new.tags) == (old.key_id, 7, {"team": "a"})
    for hours, states in ((0, ["active", "active"]), (23, ["active", "active"]), (24, ["expired", "active"])):
        found = [keys.find(key.key_id) for key in (old, new)]
        assert [key.state(NOON + timedelta(hours=hours)) for key in found if key is not None] == states
    assert clock.now == NOON


def test_rotation_never_prolongs_a_key(keys: ApiKeys) -> None:
    old, _ = keys.create("acme", "search", expires_in=timedelta(hours=1))
    new, _ = keys.rotate(old.key_id, timedelta(hours=24))
    found = keys.find(old.key_id)
    assert found is not None
    assert found.expires_at == new.expires_at == NOON + timedelta(hours=1)


def test_a_tenant_sees_its_own_keys(keys: ApiKeys) -> None:
    made = [keys.create(tenant, "one")[0].key_id for tenant in ("acme", "globex")]
    assert [key.key_id for key in keys.all("acme")] == made[:1]


def test_every_step_is_a_link_of_the_tenants_chain(keys: ApiKeys, store: Ledger) -> None:
    made, _ = keys.create("acme", "search")
    keys.rotate(made.key_id, timedelta(hours=1))
    keys.revoke(made.key_id)
    verified = verify_ledger(store)
    assert (verified.findings, verified.links) == ([], 4)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tenant": " acme"}, "tenant"),
        ({"tenant": ""}, "tenant"),
        ({"name": "a\nb"}, "name"),
        ({"tags": {"key": "x"}}, "'key'"),
        ({"tags": {"a": "line\nbreak"}}, "tag 'a'"),
        ({"scopes": ("all",)}, "scope 'all'"),
        ({"scopes": ()}, "scope ''"),
        ({"tiers": ("two words",)}, "two words"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"parallel": 2**31}, "parallel"),
    ],
)
def test_a_bound_that_no_request_could_have_is_refused(ledger: Ledger, fields: dict[str, Any], said: str) -> None:
    keys = ApiKeys(ledger)
    with pytest.raises(AccessError, match=said):
        keys.create(**{"tenant": "acme", "name": "search", **fields})
    assert keys.all(ALL_TENANTS) == []


PROCESSES, TRIES = 4, 40


def limited(key_id: str = "abcd2345", **limits: Any) -> ApiKey:
    """A key with these limits."""
    return ApiKey(key_id=key_id, tenant="acme", name="search", secret_hash="", not_before=NOON, **limits)


@pytest.fixture
def replicas(store: Ledger, clock: Clock) -> list[Rates]:
    return [Rates(store, clock=clock) for _ in range(3)]


def refused(rates: Rates, key: ApiKey, **others: Any) -> str | None:
    return rates.update([key], **others)[0].refused


def test_requests_of_a_minute_are_shared_and_fill_evenly(replicas: list[Rates], clock: Clock) -> None:
    key = limited(requests_per_minute=7)
    found = [refused(replicas[turn % 3], key) for turn in range(8)]
    assert found == [None] * 7 + ["requests"]
    wait = replicas[0].update([key])[0].wait_s
    assert 60 / 7 - 0.001 < wait < 60 / 7 + 0.001
    clock.pass_by(wait - 0.001)
    assert refused(replicas[1], key) == "requests"
    clock.pass_by(0.002)
    assert [refused(replicas[1], key), refused(replicas[2], key)] == [None, "requests"]
    clock.pass_by(3_600)
    assert [refused(replicas[turn % 3], key) for turn in range(8)] == [None] * 7 + ["requests"], (
        "no more than a minute's"
    )


def test_calls_of_one_update_are_let_in_by_their_order(replicas: list[Rates]) -> None:
    one, other = limited(requests_per_minute=2, parallel=9), limited("other234", parallel=1)
    verdicts = replicas[0].update([one, other, one, other, one])
    assert [verdict.refused for verdict in verdicts] == [None, None, None, "parallel", "requests"]
    assert [round(verdict.left["requests"][0], 6) for verdict in (verdicts[0], verdicts[2], verdicts[4])] == [1, 0, 0]
    assert verdicts[4].left["requests"][1] == 60


def test_tokens_are_taken_afterwards_and_owed(replicas: list[Rates], clock: Clock) -> None:
    key = limited(tokens_per_minute=100)
    assert refused(replicas[0], key) is None
    replicas[0].update([], used=[(key, 90)])
    assert refused(replicas[1], key) is None, "10 are left"
    replicas[1].update([], used=[(key, 110)])
    verdict = replicas[2].update([key])[0]
    assert (verdict.refused, round(verdict.left["tokens"][0])) == ("tokens", -100)
    clock.pass_by(60)
    assert refused(replicas[0], key) == "tokens"
    clock.pass_by(0.61)
    assert refused(replicas[0], key) is None, "one token is there again"


def test_a_limit_that_was_changed_holds_at_once(replicas: list[Rates]) -> None:
    assert refused(replicas[0], limited(requests_per_minute=1)) is None
    assert refused(replicas[1], limited(requests_per_minute=1)) == "requests"
    assert refused(replicas[1], limited(requests_per_minute=1, tokens_per_minute=5)) == "requests"
    assert refused(replicas[1], limited(tokens_per_minute=5)) is None


def test_answers_at_a_time_over_replicas(replicas: list[Rates]) -> None:
    key = limited(parallel=3)
    assert [refused(replicas[0], key), refused(replicas[0], key, running={key.key_id: 1})] == [None, None]
    assert [refused(replicas[1], key), refused(replicas[2], key)] == [None, "parallel"]
    replicas[0].update([], running={key.key_id: 1})
    assert [refused(replicas[2], key), refused(replicas[1], key, running={key.key_id: 1})] == [None, "parallel"]


def test_the_share_of_a_replica_that_is_gone_comes_back(replicas: list[Rates], clock: Clock, store: Ledger) -> None:
    key = limited(parallel=2)
    assert [refused(replicas[0], key), refused(replicas[1], key)] == [None, None]
    for _ in range(8):
        clock.pass_by(LIFETIME.total_seconds() / 4)
        replicas[1].update([], running={key.key_id: 1})  # it renews; the other was killed
    assert refused(replicas[2], key) is None
    assert refused(replicas[2], key, running={key.key_id: 1}) == "parallel", "the one that renews still counts"
    replicas[1].update([], running={key.key_id: 0})
    replicas[2].update([], running={key.key_id: 0})
    with store.snapshot() as connection:
        assert connection.execute(select(func.count()).select_from(running_table)).scalar_one() == 0


def test_nothing_is_taken_where_the_database_does_not_answer(
    replicas: list[Rates], store: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = limited(requests_per_minute=1, tokens_per_minute=10)

    def locked(**_: bool) -> None:
        raise StoreLockedError("locked.")

    with monkeypatch.context() as patched:
        patched.setattr(store, "transaction", locked)
        with pytest.raises(StoreLockedError):
            replicas[0].update([key], used=[(key, 10)])
    assert refused(replicas[1], key) is None


def test_a_clock_that_was_set_back_locks_nobody_out(replicas: list[Rates], clock: Clock) -> None:
    key = limited(requests_per_minute=60)
    refused(replicas[0], key)
    clock.pass_by(-86_400)
    replicas[0].update([key])
    clock.pass_by(1.01)
    assert refused(replicas[0], key) is None


RACE = """
import json, sys, time
from polar_billing.access.rates import Rates
from tests.billing.access.test_keys import limited
url, tries, parallel = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "parallel"
rates = Rates(url)
key = limited(parallel=5) if parallel else limited(requests_per_minute=60)
running, most, found, begun, slowest = 0, [], [], time.time(), 0.0
for _ in range(tries):
    at = time.perf_counter()
    verdict = rates.update([key], running={key.key_id: running} if parallel else None)[0]
    slowest = max(slowest, time.perf_counter() - at)
    found.append(verdict.refused)
    if parallel and verdict.refused is None:
        running += 1
print(json.dumps({"in": found.count(None), "out": found.count("requests") + found.count("parallel"),
                  "begun": begun, "ended": time.time(), "slowest": slowest}))
"""


@pytest.mark.parametrize("limit", ["requests", "parallel"])
def test_processes_at_once_never_exceed_a_limit_and_refuse_nothing_that_is_there(store: Ledger, limit: str) -> None:
    url = store.url.render_as_string(hide_password=False)
    command = [sys.executable, "-c", RACE, url, str(TRIES), limit]
    racing = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)]
    found = [json.loads(process.communicate(timeout=240)[0]) for process in racing]
    let_in, tried = sum(one["in"] for one in found), PROCESSES * TRIES
    assert let_in + sum(one["out"] for one in found) == tried
    if limit == "parallel":
        assert let_in == 5
        return
    seconds = max(one["ended"] for one in found) - min(one["begun"] for one in found)
    assert 60 <= let_in <= 60 + seconds
    left = Rates(store).update([limited(requests_per_minute=60)])[0].left["requests"][0]
    assert left < 2 + seconds, "what was not let in was not there"
