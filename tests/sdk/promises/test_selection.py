"""Which requests are audited: only the key says, and all replicas agree; the key's file; and shares that cannot be."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_sdk.errors import AuditError
from polar_sdk.request import selection
from polar_sdk.request.selection import Selection, find_key, shares_of
from polar_sdk.usage import ListSink

if TYPE_CHECKING:
    from pathlib import Path

IDS = [f"request-{number}" for number in range(4_000)]


def chosen(key: bytes, share: float, tenant: str = "acme") -> set[str]:
    return {name for name in IDS if Selection(key).chooses(tenant, name, share)}


def test_replicas_with_one_key_choose_the_same_and_others_choose_others() -> None:
    first, other = os.urandom(32), os.urandom(32)
    assert chosen(first, 0.1) == chosen(first, 0.1)
    # Of requests that one key chooses, another chooses about the share: nothing can be said without the key.
    both = len(chosen(first, 0.1) & chosen(other, 0.1))
    assert both < 0.4 * len(chosen(first, 0.1))
    assert len(chosen(first, 0.1) & chosen(first, 0.1, tenant="other")) < 0.4 * len(chosen(first, 0.1))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_the_share_is_met(share: float) -> None:
    spread = 6 * (share * (1 - share) * len(IDS)) ** 0.5
    assert abs(len(chosen(b"k" * 32, share)) - share * len(IDS)) < spread


@given(st.text(), st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_chooses_more_of_the_same(tenant: str, request_id: str, one: float, other: float) -> None:
    low, high = sorted((one, other))
    chooses = Selection(b"k" * 32).chooses
    assert chooses(tenant, request_id, low) <= chooses(tenant, request_id, high)
    assert chooses(tenant, request_id, 1.0) and not chooses(tenant, request_id, 0.0)


def test_the_key_is_made_once_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "key_path", lambda: tmp_path / "data" / "audit.key")
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: find_key(), range(8)))
    assert len(keys) == 1 and keys == {find_key()}
    assert stat.S_IMODE((tmp_path / "data" / "audit.key").stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["audit.key"]


@pytest.mark.parametrize(("mode", "content"), [(0o644, "k" * 64), (0o600, "short")])
def test_a_key_that_others_may_read_or_guess_is_refused(tmp_path: Path, mode: int, content: str) -> None:
    file = tmp_path / "key"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(AuditError, match=str(file)):
        find_key(file)


def test_a_key_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="missing"):
        find_key(tmp_path / "missing")


class Settling(ListSink):
    settled_tiers = frozenset({"standard"})
    keeps_audits = True


@pytest.mark.parametrize("asked", [-0.1, 1.1, float("nan"), True, "0.1", {"standard": 2}, {"gold": 0.1}])
def test_a_share_that_cannot_be_is_refused(asked: Any) -> None:
    with pytest.raises(AuditError):
        shares_of(asked, ["economy", "standard"], ListSink(), kept=True)


@pytest.mark.parametrize("asked", [0, {"standard": 0}])
def test_a_promise_that_is_settled_from_audits_is_not_served_without(asked: Any) -> None:
    with pytest.raises(AuditError, match="standard"):
        shares_of(asked, ["economy", "standard"], Settling(), kept=True)


def test_shares_by_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "DEFAULT_SHARE", 0.01)
    tiers = ["economy", "standard"]
    assert shares_of(None, tiers, ListSink(), kept=True) == {"economy": 0.0, "standard": 0.0}
    assert shares_of(None, tiers, Settling(), kept=True) == dict.fromkeys(tiers, 0.01)
    assert shares_of({"economy": 0.2}, tiers, Settling(), kept=True)["economy"] == 0.2
    with pytest.raises(AuditError, match="ledger=None"):
        shares_of(0.1, tiers, ListSink(), kept=False)
