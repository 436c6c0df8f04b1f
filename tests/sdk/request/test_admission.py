"""Before compute: what the sink is told of a request, and that its answer is obeyed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from polar_sdk.errors import BudgetExceededError, SinkError
from polar_sdk.request.admission import DOWNGRADED_TAG
from polar_sdk.testing import tiny_model
from polar_sdk.usage import ListSink

if TYPE_CHECKING:
    from polar_sdk.usage import UsageBound


class Gate(ListSink):
    """Serves the offer of a given index, refuses named requests, and remembers what it was asked."""

    def __init__(self, offer: int = 0, refuse: str | None = None) -> None:
        super().__init__()
        self.offer, self.refuse = offer, refuse
        self.bounds: list[UsageBound] = []
        self.released: list[tuple[str, str]] = []

    def reserve(self, bound: UsageBound) -> int:
        if bound.request_id == self.refuse:
            raise BudgetExceededError("nothing is left.", hint="Wait.", level="tenant", name=bound.tenant)
        self.bounds.append(bound)
        return self.offer

    def release(self, tenant: str, request_id: str) -> None:
        self.released.append((tenant, request_id))


def test_a_bound_says_what_a_request_uses_if_it_takes_all_its_tokens() -> None:
    gate = Gate()
    model = tiny_model(sink=gate, tenant="acme", tags={"project": "search"})
    done = model.generate("hello", compute="premium", max_tokens=7, seed=1)
    (bound,) = gate.bounds
    assert (bound.tenant, bound.tags, bound.request_id) == ("acme", {"project": "search"}, done.usage.request_id)
    assert (bound.tokens_input, bound.tokens_output_max) == (done.usage.tokens.input, 7)
    assert bound.at == done.usage.started_at
    assert [(offer.tier, offer.program) for offer in bound.offers] == [
        ("premium", "0-5"),
        ("standard", "0 2-5"),
        ("economy", "0 3-5"),
    ]
    if done.finish_reason == "length":
        assert done.usage.flops.total == bound.offers[0].flops_bound
    assert done.usage.flops.total <= bound.offers[0].flops_bound
    bounds = [offer.flops_bound for offer in bound.offers]
    assert bounds == sorted(bounds, reverse=True)


def test_the_cheapest_has_no_other_offer_and_a_program_by_hand_keeps_its_own() -> None:
    gate = Gate()
    model = tiny_model(sink=gate)
    model.generate("hello", compute="economy", max_tokens=2)
    model.generate("hello", program="0 2-5", max_tokens=2)
    assert [[(offer.tier, offer.program) for offer in bound.offers] for bound in gate.bounds] == [
        [("economy", "0 3-5")],
        [(None, "0 2-5"), ("economy", "0 3-5")],
    ]


@pytest.mark.parametrize(("options", "asked"), [({"compute": "exact"}, "exact"), ({"program": "0-5"}, "0-5")])
def test_the_offer_that_the_sink_chose_is_what_runs(options: dict[str, str], asked: str) -> None:
    gate = Gate(offer=2)
    model = tiny_model(sink=gate, tags={"team": "x"})
    done = model.generate("hello", max_tokens=5, **options)  # type: ignore[arg-type]
    usage = done.usage
    assert (usage.tier, usage.program, usage.router) == ("economy", "0 3-5", "static")
    assert usage.tags == {"team": "x", DOWNGRADED_TAG: asked}
    assert usage.visits.prefill == (1, 0, 0, 1, 1, 1)
    assert usage.flops.total <= gate.bounds[0].offers[2].flops_bound
    assert usage.identity_flops > usage.flops.total
    assert done.token_ids == tiny_model().generate("hello", max_tokens=5, compute="economy").token_ids


def test_a_refused_request_of_a_batch_gives_back_what_was_held_for_the_others() -> None:
    gate = Gate(refuse="c")
    model = tiny_model(sink=gate, tenant="acme")
    with pytest.raises(BudgetExceededError) as caught:
        model.generate_batch(["1", "2", "3", "4"], each=[{"request_id": name} for name in "abcd"], max_tokens=2)
    assert (caught.value.level, caught.value.name, caught.value.exit_code) == ("tenant", "acme", 3)
    assert [bound.request_id for bound in gate.bounds] == ["a", "b"]
    assert gate.released == [("acme", "a"), ("acme", "b")]
    assert gate.records == []  # nothing ran


def test_a_sink_that_cannot_tell_stops_the_request_before_it_computes() -> None:
    class Away(Gate):
        def reserve(self, bound: UsageBound) -> int:
            raise SinkError("the store is away.")

    away = Away()
    with pytest.raises(SinkError):
        tiny_model(sink=away).generate("hello", max_tokens=2)
    with pytest.raises(SinkError):
        next(tiny_model(sink=away).stream("hello", max_tokens=2))
    assert away.records == []


def test_a_sink_without_budgets_serves_what_was_asked() -> None:
    sink = ListSink()
    done = tiny_model(sink=sink).generate("hello", compute="premium", max_tokens=2)
    assert sink.records == [done.usage]
    assert (done.usage.tier, done.usage.tags) == ("premium", {})
