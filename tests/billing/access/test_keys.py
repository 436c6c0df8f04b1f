"""API keys on every store: made, found, rotated, revoked; a secret is never stored, and every step is in the chain."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from polar_billing.access.keys import ApiKeys
from polar_billing.errors import AccessError
from polar_billing.ledger.records import ALL_TENANTS
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
