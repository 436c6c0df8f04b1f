"""Audits as facts, and the standings that sinks without a ledger keep of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from polar_sdk.promises.audit import Audit
from polar_sdk.promises.monitor import State
from polar_sdk.usage import ForwardingSink, ListSink, NullSink, new_request_id

PROMISE, OTHER = "a" * 64, "b" * 64
AT = datetime(2026, 1, 1, tzinfo=UTC)


def audit(**changes: Any) -> Audit:
    """An audit of an answer that was kept whole."""
    facts: dict[str, Any] = {
        "audit_id": new_request_id(),
        "request_id": "r-1",
        "tenant": "acme",
        "tier": "standard",
        "promise": PROMISE,
        "alpha": 0.05,
        "delta": 0.1,
        "lost": False,
        "compared": 48,
        "kept": 48,
        "prompt_tokens": 60,
        "flops": 10**9,
        "audit_request_id": "a-1",
        "at": AT,
    }
    return Audit(**(facts | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"kept": 49},
        {"weight": 0},
        {"weight": 1.5},
        {"alpha": 1},
        {"promise": "abc"},
        {"audit_id": "6f9619ff-8b86-4011-b42d-00c04fc964ff"},
        {"audit_id": "x" * 36},
        {"at": datetime(2026, 1, 1)},
        {"prompt": "what was asked"},
    ],
)
def test_an_audit_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        audit(**changes)


def test_an_audit_reads_back_from_its_json() -> None:
    made = audit(lost=True, kept=3)
    assert Audit.model_validate_json(made.model_dump_json()) == made


def test_losses_put_one_promise_at_risk_and_no_other() -> None:
    sink = ListSink()
    for number in range(40):
        sink.audited(audit(lost=True, kept=0, at=AT + timedelta(minutes=number)))
        sink.audited(audit(promise=OTHER, tier="premium"))
    standings = sink.standings()
    assert standings[PROMISE].state is State.AT_RISK
    assert AT < standings[PROMISE].since < AT + timedelta(minutes=39), "the state began at an audit on the way"
    assert (standings[PROMISE].audits, standings[PROMISE].losses) == (40, 40)
    assert (standings[OTHER].state, standings[OTHER].since) == (State.IN_FORCE, AT)


def test_an_audit_counts_once() -> None:
    sink, same = ListSink(), audit(lost=True, kept=0)
    for _ in range(40):
        sink.audited(same)
    assert sink.standings()[PROMISE].audits == 1
    assert sink.standings()[PROMISE].state is State.IN_FORCE


def test_a_sink_around_another_passes_audits_on() -> None:
    inner = ListSink()
    outer = ForwardingSink(ForwardingSink(inner))
    outer.audited(audit())
    assert outer.standings() == inner.standings()
    assert outer.standings()[PROMISE].audits == 1


def test_a_sink_that_knows_of_no_audits_puts_nothing_at_risk() -> None:
    sink = NullSink()
    sink.audited(audit(lost=True, kept=0))
    assert not sink.standings()
    assert not sink.keeps_audits
    assert not sink.settled_tiers
