"""Drafts change how many passes an answer takes, and nothing else."""

from __future__ import annotations

import gc
import math
from collections import Counter
from contextlib import contextmanager
from functools import cache
from threading import Event
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from polar_sdk import PolarModel
from polar_sdk.cli.run import footer
from polar_sdk.engine.attention import write_pages
from polar_sdk.engine.draft_head import Guess
from polar_sdk.engine.forward import drafted_logits, next_logits
from polar_sdk.engine.kernels import TorchKernels
from polar_sdk.engine.pages import PAGE
from polar_sdk.engine.row import Row
from polar_sdk.engine.sampling import Sampling
from polar_sdk.engine.work import Work
from polar_sdk.errors import InvalidRequestError
from polar_sdk.frameworks.cost import cost_facts
from polar_sdk.programs.policy import LoopGuard
from polar_sdk.programs.program import Program
from polar_sdk.serving import drafts as drafts_module
from polar_sdk.serving.drafts import (
    FREE_WASTE,
    WASTE_PER_TOKEN,
    Drafts,
    Experience,
    Hits,
    OtherAnswers,
    Proposal,
    TokenIndex,
    drafts_of,
)
from polar_sdk.serving.pass_costs import MAX_ROWS, DraftedRow, PassCosts, planned
from polar_sdk.serving.places import Limits
from polar_sdk.testing import random_fill, tiny_llama, tiny_policy, tiny_tokenizer
from tests.sdk.paged import paged_decode
from tests.sdk.repeating import repeating_llama

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.kernels import PagedTokens
    from polar_sdk.engine.types import AttentionKind, Rotary, Weights
    from polar_sdk.request.generation import Generation

DEPTH = 6
PROGRAMS = ["0-5", "0 2-5", "0-2 3x2 4-5", "0-2 3~2 4-5", "0-1 4-5"]


@cache
def repeating(mixing: float = 0.3, context_window: int = 512) -> PolarModel:
    """A tiny model that likes to say again what it has said."""
    network = repeating_llama(mixing, tie_word_embeddings=True, max_position_embeddings=context_window)
    policy = tiny_policy(DEPTH).model_copy(update={"cost_ceiling": 3.0})
    return PolarModel.from_hf(network, tiny_tokenizer(), policy=policy, ledger=None)


@contextmanager
def few_rows(model: PolarModel) -> Iterator[None]:
    """Let 8 rows run together, so that as many are idle."""
    before, model.scheduler.limits = model.scheduler.limits, Limits(max_rows=8)
    yield
    model.scheduler.limits = before


def same(plain: Generation, drafted: Generation) -> None:
    """The same answer, and the same bill, in no more passes."""
    assert drafted.token_ids == plain.token_ids
    assert (drafted.text, drafted.finish_reason, drafted.complete) == (
        plain.text,
        plain.finish_reason,
        plain.complete,
    )
    ours, theirs = drafted.usage, plain.usage
    assert ours.flops.total == theirs.flops.total
    assert ours.flops.model_copy(update={"drafts": 0}) == theirs.flops
    assert (ours.identity_flops, ours.loops_stopped) == (theirs.identity_flops, theirs.loops_stopped)
    assert ours.visits.prefill == theirs.visits.prefill
    assert all(a <= b for a, b in zip(ours.visits.decode, theirs.visits.decode, strict=True)) or ours.flops.drafts
    assert theirs.flops.drafts == theirs.tokens.drafted == 0
    if (mine := drafted.logprobs) is not None:
        assert plain.logprobs is not None
        assert [each.token for each in mine] == [each.token for each in plain.logprobs]
        assert [each.logprob for each in mine] == pytest.approx([each.logprob for each in plain.logprobs], abs=1e-4)


def both(model: PolarModel, prompt: str, speculate: Any = "prompt", **options: Any) -> tuple[Generation, Generation]:
    """An answer without drafts and one with; no start of the prompt is shared."""
    plain = model.generate(prompt, tenant="plain", speculate="off", **options)
    return plain, model.generate(prompt, tenant="drafted", speculate=speculate, **options)


# -- what is proposed ------------------------------------------------------------------------------------------------


def brute_force(tokens: Sequence[int], count: int) -> list[int]:
    for length in (3, 2, 1):
        last = list(tokens[-length:])
        for start in range(len(tokens) - length - 1, -1, -1):
            if len(tokens) > length and list(tokens[start : start + length]) == last:
                grown = list(tokens)
                for place in range(count):
                    grown.append(grown[start + length + place])
                return grown[len(tokens) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 7), st.integers(0, 30))
def test_what_followed_the_last_match_is_proposed(tokens: list[int], count: int, cut: int) -> None:
    index = TokenIndex()
    index.extend(tokens[:cut])
    index.extend(tokens[cut:])
    assert index.propose(count).tokens == brute_force(tokens, count)


def test_earlier_answers_are_found_by_tenant_from_their_first_token_on() -> None:
    others = OtherAnswers()
    others.add("acme", [7, 8, 9], [1, 2, 3, 4])
    assert others.following("acme", [5, 8, 9], 3) == Proposal([1, 2, 3], 2, "earlier")
    assert others.following("acme", [6, 3], 3) == Proposal([4], 1, "earlier")
    assert not others.following("acme", [5], 3).tokens
    assert not others.following("globex", [7, 8, 9], 3).tokens
    others.add("acme", [7, 8, 9], [5])
    assert others.following("acme", [7, 8, 9], 3).tokens == [5]  # the latest


def test_few_tenants_and_few_tokens_of_each_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts_module, "_EARLIER_TOKENS", 6)
    monkeypatch.setattr(drafts_module, "_EARLIER_TENANTS", 2)
    earlier = OtherAnswers()

    def found(tenant: str, *tokens: int) -> list[int]:
        return [token for token in tokens if earlier.following(tenant, [token], 1).tokens]

    earlier.add("acme", [1], [2, 3, 4, 5, 6, 7, 8])
    assert found("acme", 5, 6) == [5]  # there was no room for what followed
    earlier.add("acme", [11], [12, 13, 14, 15])
    assert found("acme", 4, 14) == [4, 14]
    earlier.add("acme", [21], [22, 23, 24, 25, 26])
    earlier.add("acme", [31], [32])
    assert found("acme", 4, 14, 31) == [14, 31]
    for tenant in ("globex", "initech"):
        earlier.add(tenant, [1], [2])
    assert (found("acme", 31), found("globex", 1)) == ([], [1])


class Told(OtherAnswers):
    """Other answers that say the same whatever the last tokens are."""

    def __init__(self, proposal: Proposal) -> None:
        super().__init__()
        self.proposal = proposal

    def following(self, tenant: str, last: Sequence[int], count: int) -> Proposal:
        """That."""
        return self.proposal


def _known(proposal: Proposal = Proposal([], 0, "earlier"), costs: PassCosts | None = None) -> Experience:  # noqa: B008
    known = Experience()
    known.others = Told(proposal)
    known.costs = costs or known.costs
    return known


def _proposed(
    drafts: Drafts, answer: Sequence[int], room: int, known: Experience, guesses: Sequence[Guess] = ()
) -> Proposal:
    asked = drafts.look_up(answer, room, known, "acme")
    return drafts.propose(guesses if asked else [], known.costs)


def test_what_gains_most_is_proposed() -> None:
    prompts = {1: [5, 1, 6, 2, 1], 2: [5, 1, 6, 5, 1], 3: [4, 5, 1, 6, 4, 5, 1]}
    """By number of tokens that match."""
    found = {}
    for chance in (0.1, 0.5, 0.9):
        guesses = [Guess(99, chance), Guess(96, 0.9)]
        for match, prompt in prompts.items():
            known = _known(Proposal([98, 97], 2, "earlier"), _costs(0.05))
            found[chance, match] = _proposed(Drafts(prompt, "auto"), [], 2, known, guesses).source
            assert _proposed(Drafts(prompt, "prompt"), [], 3, known, guesses).source == "request"
    assert found == {
        (0.1, 1): "earlier",
        (0.5, 1): "head",
        (0.9, 1): "head",
        (0.1, 2): "request",
        (0.5, 2): "head",
        (0.9, 2): "head",
        (0.1, 3): "request",
        (0.5, 3): "request",
        (0.9, 3): "head",
    }


def test_many_tokens_of_little_chance_gain_less_than_few_that_are_likely() -> None:
    costs = _costs(0.1)
    assert costs.gain([]) == 1
    assert costs.gain([0.9]) == pytest.approx(1.9 / 1.1)
    assert costs.gain([0.9, 0.01]) == costs.gain([0.9])
    assert costs.gain([0.15] * 11) < costs.gain([0.9])
    assert _costs(2.0).gain([0.9, 0.8]) == 1


def test_a_draft_head_that_is_wrong_about_a_request_is_left_alone() -> None:
    guesses, said = [Guess(9, 0.8)] * 5, Proposal([9] * 5, 0, "head", (0.8,) * 5)
    drafts, known, tried, asked = Drafts([1, 2, 3], "auto"), _known(costs=_costs(0.05)), list[int](), list[int]()
    for step in range(600):
        if drafts.look_up(list(range(10, 10 + step)), 7, known, "acme"):
            asked.append(step)
        drafts.propose(guesses if asked and asked[-1] == step else [], known.costs)
        assert step or list(drafts.row.chances) == pytest.approx([0.8**power for power in range(1, 6)])
        (count,) = planned([drafts.row], known.costs)
        if count:
            drafts.judged(count, 1, known)
            tried.append(step)
        else:
            drafts.passed(known.costs)
    assert tried[0] == 0
    assert len([step for step in tried if step > 50]) < 5
    assert len([step for step in asked if step > 50]) < 6  # nobody waits for what does not pay
    for _ in range(50):  # and one that knows more than it says is trusted
        known.hits.tried(said._replace(said=(0.5,) * 5), 5, 5)
    assert known.hits.chances(said._replace(tokens=[9], said=(0.5,)))[0] > 0.9


def test_a_draft_head_is_asked_as_long_as_it_brings_more_than_it_takes() -> None:
    guesses = [Guess(9, 0.5)] * 2

    def asked(brought: int, guess: float) -> int:
        drafts, known, times = Drafts([1, 2, 3], "auto"), _known(costs=_costs(0.01)), 0
        for _ in range(5):
            known.costs.measured(1, 1.0)
            known.costs.guessed(2, 2 * guess)
        for step in range(300):
            asking = drafts.look_up(list(range(10, 10 + step)), 7, known, "acme")
            times += bool(asking)
            drafts.propose(guesses if asking else [], known.costs)
            if asking:
                drafts.judged(2, 1 + brought * (step % 3 == 0), known)
        return times

    assert asked(brought=2, guess=0.2) == 300  # 2 tokens of three passes, for 2 × 0.2 in each
    assert asked(brought=2, guess=0.5) < 60
    assert asked(brought=1, guess=0.1) == 300
    assert asked(brought=1, guess=0.3) < 60


def test_a_text_goes_on_from_what_was_guessed() -> None:
    known = _known(costs=_costs(0.01))
    drafts = Drafts([1, 2, 3, 4, 5, 6, 7, 8, 9], "auto")
    assert _proposed(drafts, [3], 9, known, [Guess(20, 0.9)]).tokens == [20]  # no text has it after 3
    for guesses, expected in (
        ([Guess(20, 0.9), Guess(3, 0.9), Guess(4, 0.9)], [20, 3, 4, 5, 6, 7, 8, 9, 30]),
        ([Guess(20, 0.9), Guess(3, 0.9), Guess(20, 0.9)], [20, 3, 20]),  # a single token says too little
    ):
        drafts = Drafts([1, 2, 3, 4, 5, 6, 7, 8, 9], "auto")
        proposal = _proposed(drafts, [30], 9, known, guesses)
        assert proposal.tokens == expected
        assert [*drafts.row.chances] == sorted(drafts.row.chances, reverse=True)
        assert proposal.said == tuple(guess.chance for guess in guesses)
    drafts = Drafts([1, 2, 3, 4, 5, 6, 7, 8, 9], "auto")
    _proposed(drafts, [30], 9, known, [Guess(3, 0.9), Guess(4, 0.9)])
    drafts.judged(8, 1 + 8, known)
    assert drafts._hits is not None
    assert drafts._hits.chances(Proposal([5, 6], 2)) > Hits().chances(Proposal([5, 6], 2))


def test_nobody_asks_a_draft_head_where_texts_are_sure() -> None:
    drafts, known = Drafts([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], "auto"), _known(costs=_costs(0.03))
    answer: list[int] = []
    asked = []
    for token in range(1, 13):
        answer.append(token)
        asked.append(bool(drafts.look_up(answer, 7, known, "acme")))
        count = len(drafts.propose([], known.costs).tokens)
        if count:
            drafts.judged(count, 1 + count, known)
    assert asked[0]
    assert not any(asked[6:11])


def test_what_the_draft_head_guessed_as_well_counts_for_it() -> None:
    drafts, known = Drafts([1, 2, 3, 4, 5, 6], "auto"), _known(costs=_costs(0.01))
    for step in range(100):
        asked = drafts.look_up([1] * (step + 1), 7, known, "acme")
        proposal = drafts.propose([Guess(1, 0.1), Guess(1, 0.1)], known.costs)
        assert asked or step
        assert proposal.source == "request"  # more certain than what was guessed
        drafts.judged(len(proposal.tokens), 3, known)
    assert drafts._head.take_turn()


def test_where_drafts_come_from_is_learnt_apart() -> None:
    hits = Hits()
    own, earlier = Proposal([1, 2], 2), Proposal([1, 2], 2, "earlier")
    before = hits.chances(own)
    for _ in range(50):
        hits.tried(earlier, 2, 2)
    assert hits.chances(own) == before
    assert min(hits.chances(earlier)) > 0.9
    assert Hits(hits).chances(earlier) == hits.chances(earlier)


def _drafts(always: bool = False) -> Drafts:
    drafts = Drafts([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3], "prompt" if always else "auto")
    _proposed(drafts, [], 7, _known())
    return drafts


def _took(costs: PassCosts, rows: int) -> float:
    """Time of a pass of so many rows."""
    return costs.by_width()[rows - 1]


def _costs(per_row: float) -> PassCosts:
    costs = PassCosts()
    for _ in range(5):
        costs.measured(1, 1.0)
    for rows in range(2, MAX_ROWS + 1):
        for _ in range(3):
            costs.measured(rows, 1 + per_row * (rows - 1))
    return costs


def test_drafts_fill_idle_rows_only() -> None:
    for rows in range(1, 20):
        counts = planned([_drafts(always=True).row] * rows, _costs(0.0))
        assert sum(counts) == max(min(MAX_ROWS - rows, 7 * rows), 0)


def test_drafts_are_made_where_they_pay() -> None:
    assert planned([_drafts().row], _costs(0.01))[0] >= 5
    assert planned([_drafts().row], _costs(2.0)) == [0]
    assert planned([_drafts().row, DraftedRow()], _costs(0.2)) == [0, 0]  # the other one would be slower for it


def test_wrong_drafts_end_and_are_tried_again_less_and_less_often() -> None:
    drafts, known, tried = _drafts(), _known(costs=_costs(0.2)), list[int]()
    for step in range(600):
        _proposed(drafts, [1, 2, 3] * 200, 7, known)
        (count,) = planned([drafts.row], known.costs)
        if count:
            drafts.judged(count, 1, known)
            tried.append(step)
        else:
            drafts.passed(known.costs)
    assert len(tried) < 20
    assert tried[-1] - tried[-2] > 3 * (tried[-3] - tried[-4]) / 2


def test_a_busy_moment_is_measured_beside_itself() -> None:
    costs = _costs(0.1)
    assert [_took(costs, rows) for rows in (1, 2, 8, 16)] == pytest.approx([1, 1.1, 1.7, 2.5])
    for _ in range(12):  # everything takes ten times as long
        costs.measured(1, 10.0)
        costs.measured(8, 17.0)
    assert _took(costs, 8) == pytest.approx(1.7, abs=0.05)
    for _ in range(100):  # wide passes that no narrow one stands beside say nothing
        costs.measured(8, 99.0)
    assert _took(costs, 8) == pytest.approx(1.7, abs=0.05)


def test_a_pass_that_took_long_by_chance_says_little() -> None:
    costs = PassCosts()
    for rows, seconds in ((1, 1.0), (2, 1.0), (3, 1.05), (4, 1.1)) * 3:
        costs.measured(rows, seconds)
    before = list(costs.by_width())
    costs.measured(12, 50.0)
    assert list(costs.by_width()) == before == sorted(before)
    costs.measured(3, 50.0)
    assert _took(costs, 4) == pytest.approx(1.1, abs=0.05)


def test_wide_passes_cost_what_passes_of_their_width_did() -> None:
    costs, took = PassCosts(), {1: 1.0, 3: 1.0, 8: 1.4, 12: 1.5, 16: 2.0}
    for rows, seconds in took.items():
        for each in (1, 1, 1, rows, rows, rows):
            costs.measured(each, seconds if each == rows else 1.0)
    assert [_took(costs, rows) for rows in took] == pytest.approx(list(took.values()))


def test_costs_are_guessed_until_they_are_measured() -> None:
    costs = PassCosts()
    assert 1 < _took(costs, 2) < _took(costs, 8)
    for _ in range(3):
        costs.measured(1, 1.0)
    for _ in range(3):
        costs.measured(5, 1.0)
    assert _took(costs, 5) == 1
    assert _took(costs, 2) == 1
    assert 1 < _took(costs, 8) < 1.2


@pytest.mark.parametrize(
    ("speculate", "sampling", "exact", "repeats", "drafted"),
    [
        # a seeded answer keeps to itself where passes are rounded differently
        ("auto", Sampling(temperature=1, seed=3), False, False, False),
        ("auto", Sampling(temperature=1, seed=3), False, True, True),
        ("auto", Sampling(seed=3), False, False, True),
        ("off", Sampling(), True, True, False),
        # by default, drafts are made where they change nothing
        (None, Sampling(), False, True, False),
        (None, Sampling(), True, True, True),
    ],
)
def test_where_drafts_are_made(speculate: Any, sampling: Sampling, exact: bool, repeats: bool, drafted: bool) -> None:
    drafts = drafts_of([1], speculate, sampling, exact=exact, repeats=repeats)
    assert (drafts is not None) == drafted
    assert drafts is None or not drafts.always


def test_where_they_cannot_be_exact_nothing_is_held_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def held(**options: Any) -> int:
        return repeating().bound("abc", max_tokens=9, **options).offers[0].drafts_bound

    assert held(speculate="auto") > held() == held(speculate="off") == 0
    monkeypatch.setattr(TorchKernels, "independent", True)
    assert held() == held(speculate="auto")


# -- answers ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(
    prompt=st.text("abcd e", min_size=1, max_size=80).filter(lambda text: text.strip()),
    speculate=st.sampled_from(["prompt", "auto"]),
    max_tokens=st.integers(1, 40),
    stop=st.lists(st.text("abc", min_size=1, max_size=3), max_size=2),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_p=st.sampled_from([1.0, 0.9]),
    seed=st.integers(0, 99),
    program=st.sampled_from(PROGRAMS),
    logprobs=st.sampled_from([None, 2]),
)
def test_an_answer_is_the_same_with_drafts(prompt: str, **options: Any) -> None:
    plain, drafted = both(repeating(), prompt, **options)
    same(plain, drafted)
    record = drafted.usage
    assert record.tokens.accepted <= record.tokens.drafted
    bound = repeating().bound(prompt, **options).offers[0]
    assert record.flops.executed <= bound.flops_bound + bound.drafts_bound
    assert record.flops.total <= bound.flops_bound


def test_drafts_spare_passes_and_are_shown() -> None:
    before = repeating(0.05).scheduler.sampled_tokens
    plain, drafted = both(repeating(0.05), "abcabcabc", max_tokens=60)
    same(plain, drafted)
    assert repeating(0.05).scheduler.sampled_tokens - before == 120
    tokens, beyond = drafted.usage.tokens, drafted.usage.flops.drafts
    assert tokens.accepted > 30
    assert max(drafted.usage.visits.decode) == 59 - tokens.accepted
    assert max(plain.usage.visits.decode) == 59
    assert f"{tokens.accepted} of {tokens.drafted} drafts kept (+{beyond / 1e9:.2f} GFLOP)" in footer(drafted)
    assert "draft" not in footer(plain)
    facts = {"drafted": tokens.drafted, "accepted": tokens.accepted, "flops": beyond}
    assert cost_facts(drafted.usage, None)["polar"]["drafts"] == facts
    assert "drafts" not in cost_facts(plain.usage, None)["polar"]


def test_drafts_may_be_off_for_an_object_and_on_for_a_call() -> None:
    model = repeating(0.05)
    assert model.generate("aaaa", max_tokens=9).usage.tokens.drafted == 0
    assert model.generate("aaaa", max_tokens=9, speculate=None).usage.tokens.drafted == 0
    with pytest.raises(InvalidRequestError, match=r"int4.*auto, off, prompt"):
        model.generate("a", speculate="int4")  # type: ignore[arg-type]


class WideAsNarrow(PassCosts):
    """Passes that take the same whatever their number of rows, on a machine however busy."""

    def by_width(self) -> Sequence[float]:
        return [1.0] * MAX_ROWS


def test_answers_that_a_tenant_had_before_are_drafted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = repeating(1.0)
    monkeypatch.setattr(model.scheduler._passes.drafting, "costs", WideAsNarrow())
    first, second = (model.generate("Hello", max_tokens=30, speculate="auto", tenant="again") for _ in range(2))
    other = model.generate("Hello", max_tokens=30, speculate="auto", tenant="other")
    plain = model.generate("Hello", max_tokens=30, speculate="off", tenant="plain")
    assert second.token_ids == first.token_ids == plain.token_ids
    assert second.usage.tokens.accepted > 15 + first.usage.tokens.accepted
    assert second.usage.flops.total == plain.usage.flops.total
    assert other.usage.tokens.accepted <= first.usage.tokens.accepted + 5


def test_prompts_in_chunks_and_shared_starts() -> None:
    model = repeating(0.2, 2048)
    prompt = "the same words again and again; " * 30
    plain = model.generate(prompt, max_tokens=30, tenant="plain")
    for _ in range(2):
        drafted = model.generate(prompt, max_tokens=30, speculate="prompt", tenant="drafted")
        assert drafted.token_ids == plain.token_ids
        assert drafted.usage.flops.layers_decode == plain.usage.flops.layers_decode
    assert drafted.usage.tokens.cached > 0


def test_programs_decode_together() -> None:
    model = repeating()
    prompts = [f"{letter * 3} b {letter * 3}" for letter in "abcde"]
    programs = [{"program": program} for program in PROGRAMS]
    alone = [
        model.generate(prompt, max_tokens=30, tenant="alone", **own)  # type: ignore[arg-type]
        for prompt, own in zip(prompts, programs, strict=True)
    ]
    drafted = model.generate_batch(prompts, each=programs, max_tokens=30, speculate="prompt", tenant="together")  # type: ignore[arg-type]
    for one, other in zip(alone, drafted, strict=True):
        same(one, other)
    assert sum(answer.usage.tokens.accepted for answer in drafted) > 10


def test_fills_run_with_drafts() -> None:
    model = repeating(0.2)
    model.decoder.set_fills({(3, 4): random_fill(model.decoder, (3, 4))})
    try:
        filled = PolarModel(model.loaded, policy=model.policy, ledger=None)
        same(*both(filled, "abcd abcd abcd abcd", max_tokens=30, program="0-2 (3-4:4) 5"))
    finally:
        model.decoder.set_fills({})


def test_a_guard_stops_the_same_loops_at_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, dropped, drop = set(), list[float](), Work.drop_pass

    def noted(work: Work) -> None:
        dropped.append(limit)
        drop(work)

    monkeypatch.setattr(Work, "drop_pass", noted)
    for limit in (0.3, 0.6, 0.75, 0.85, 1.0, 2.0):
        model = repeating()
        policy = model.policy.model_copy(update={"loop_guard": LoopGuard(max_step=limit, min_cosine=0.0)})
        guarded = PolarModel(model.loaded, policy=policy, ledger=None)
        plain, drafted = both(guarded, "abab cdcd abab", program="0-1 2x3 3 4x2 5", max_tokens=40)
        same(plain, drafted)
        seen.add(plain.usage.loops_stopped)
    assert seen == {0, 1, 2}
    assert dropped


def test_a_hook_is_called_once_for_every_token() -> None:
    def answered(speculate: Any) -> tuple[Generation, list[int]]:
        lengths: list[int] = []

        def hook(tokens: Sequence[int], logits: Tensor) -> Tensor:
            lengths.append(len(tokens))
            logits[ord("abc"[len(tokens) % 3])] += 100
            return logits

        done = repeating().generate("abcabc", max_tokens=40, logits_hook=hook, speculate=speculate, tenant=speculate)
        return done, lengths

    (plain, calls), (drafted, drafted_calls) = answered("off"), answered("prompt")
    same(plain, drafted)
    assert calls == drafted_calls == list(range(40))
    assert drafted.usage.tokens.accepted > 20


def test_a_grammar_forbids_the_same_tokens() -> None:
    pytest.importorskip("llguidance")
    plain, drafted = both(repeating(), "abcabcabc", max_tokens=40, regex="(abc|b){3,20}d")
    same(plain, drafted)
    assert drafted.usage.tokens.accepted > 0


@pytest.mark.parametrize("after", [1, 5])
def test_cancel_ends_within_a_token(after: int) -> None:
    def answered(speculate: Any) -> Generation:
        stop = Event()

        def hook(tokens: Sequence[int], logits: Tensor) -> Tensor:
            if len(tokens) == after:
                stop.set()
            return logits

        return repeating(0.05).generate(
            "aaaaaa", max_tokens=60, logits_hook=hook, cancel=stop, speculate=speculate, tenant=speculate
        )

    plain, drafted = answered("off"), answered("prompt")
    assert len(plain.token_ids) == after + 1
    same(plain, drafted)


def test_a_stream_is_the_same_and_may_be_left() -> None:
    model = repeating(0.05)
    texts = [
        "".join(chunk.text for chunk in model.stream("abcabc", max_tokens=40, speculate=mode, tenant=mode))
        for mode in ("off", "prompt", "auto")
    ]
    assert texts[0] == texts[1] == texts[2]
    stream = model.stream("abcabc", max_tokens=40, speculate="prompt", tenant="left")
    next(stream)
    stream.close()
    assert len(model.scheduler) == 0


def test_sampled_tokens_have_the_distribution_of_the_model() -> None:
    """The token after an accepted draft, against the model's own probabilities."""
    model, prompt, runs = repeating(0.05), "abab", 500
    ids = model.prompt_tokens(prompt)
    with few_rows(model):
        answers = model.generate_batch([prompt] * runs, max_tokens=3, temperature=0.8, speculate="prompt")
    kept = [answer.token_ids for answer in answers if answer.usage.tokens.accepted]
    ((before, accepted),) = Counter(tokens[:2] for tokens in kept).most_common(1)
    found = Counter(tokens[2] for tokens in kept if tokens[:2] == before)
    row = Row(model.decoder, model.policy.tiers["standard"].program)
    with torch.inference_mode():
        logits = next_logits(model.decoder, [row], [[*ids, *before]])[0]
    expected = (logits / 0.8).softmax(-1)
    assert accepted > 40
    chi, cells = 0.0, 0
    rest, rest_expected = accepted, float(accepted)
    for token, probability in enumerate(expected.tolist()):
        if accepted * probability >= 5:
            chi += (found[token] - accepted * probability) ** 2 / (accepted * probability)
            cells += 1
            rest, rest_expected = rest - found[token], rest_expected - accepted * probability
    chi += (rest - rest_expected) ** 2 / max(rest_expected, 1.0)
    assert chi < cells + 5 * math.sqrt(2 * cells) + 10


@pytest.fixture(scope="module")
def native_model() -> PolarModel:
    """In bfloat16, with the kernels of the native library."""
    network = tiny_llama(layers=DEPTH, hidden_size=128, tie_word_embeddings=True).bfloat16()
    model = PolarModel.from_hf(network, tiny_tokenizer(), policy=tiny_policy(DEPTH), ledger=None)
    if not model.decoder.kernels.independent:
        pytest.skip("this processor has no native kernels")
    return model


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    prompt=st.text("abc ", min_size=1, max_size=80).filter(lambda text: text.strip()),
    temperature=st.sampled_from([0.0, 1.0]),
    program=st.sampled_from(PROGRAMS[:1] + PROGRAMS[4:]),
    seed=st.integers(0, 99),
)
def test_with_the_native_library_an_answer_is_the_same_to_the_bit(
    native_model: PolarModel, prompt: str, temperature: float, program: str, seed: int
) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "program": program, "logprobs": 3}
    plain, drafted = both(native_model, prompt, temperature=temperature, seed=seed, **options)
    assert drafted.token_ids == plain.token_ids
    assert drafted.logprobs == plain.logprobs
    assert drafted.usage.flops.total == plain.usage.flops.total


def test_near_ties_do_not_hold_the_native_library_up(native_model: PolarModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polar_sdk.serving.passes.near_ties", lambda *_: pytest.fail("looked for ties"))
    plain, drafted = both(native_model, "abcabcabc", max_tokens=40)
    assert drafted.token_ids == plain.token_ids
    assert drafted.usage.tokens.drafted


# -- one pass --------------------------------------------------------------------------------------------------------


class PagedByTorch(TorchKernels):
    """Layers as one call over pages, as native ones run, by torch."""

    decodes = True

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder.family)
        self.calls: list[int] = []

    def decode(
        self, w: Weights, x: Tensor, rotary: Rotary, kind: AttentionKind, store: Tensor, tokens: PagedTokens
    ) -> Tensor:
        """A whole layer for some tokens."""
        index = torch.arange(len(tokens.positions)) if tokens.rows is None else tokens.rows
        self.calls.append(len(index))
        before, angles = x[index], tuple(each[index] for each in rotary)
        query, key, value = self.project(w, before, (angles[0], angles[1]))
        pages = tokens.table.gather(1, (tokens.positions // PAGE)[:, None])[:, 0]
        write_pages(store, pages, tokens.positions % PAGE, key, value)
        mixed = paged_decode(query, store, tokens.table, tokens.positions, kind)
        return x.index_copy(0, index, self.finish(w, before, mixed))


def _prefilled(decoder: Decoder, programs: Sequence[str], lengths: Sequence[int]) -> list[Row]:
    rows = [Row(decoder, Program.parse(program)) for program in programs]
    for row, length in zip(rows, lengths, strict=True):
        next_logits(decoder, [row], [[(7 * place) % 250 for place in range(length)]])
    return rows


@pytest.mark.parametrize("paged", [False, True])
@torch.inference_mode()
def test_rows_of_several_tokens_are_what_one_token_after_another_gives(paged: bool) -> None:
    decoder = repeating(1.0).decoder
    lengths = [3, 62, 64, 130, 20]
    pieces = [[5, 6, 7], [8], [1, 2, 3, 4, 5, 6, 7, 8], [9, 9], [4, 4, 4, 4]]
    alone = [
        torch.cat([next_logits(decoder, [row], [[token]]) for token in piece])
        for row, piece in zip(_prefilled(decoder, PROGRAMS, lengths), pieces, strict=True)
    ]
    plain = decoder.kernels
    if paged:
        decoder.kernels = PagedByTorch(decoder)
    try:
        rows = _prefilled(decoder, PROGRAMS, lengths)
        together = drafted_logits(decoder, rows, pieces)
    finally:
        kernels, decoder.kernels = decoder.kernels, plain
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)
    if isinstance(kernels, PagedByTorch):
        assert max(kernels.calls) == sum(map(len, pieces))


@torch.inference_mode()
def test_flops_with_drafts_are_torchs_own() -> None:
    decoder = repeating(1.0).decoder
    for program in PROGRAMS:
        (row,), (plain,) = _prefilled(decoder, [program], [20]), _prefilled(decoder, [program], [20])
        for kept in (3, 0, 1, 4):
            before = row.work.executed
            start = row.length
            with FlopCounterMode(display=False) as counter:
                drafted_logits(decoder, [row], [[1, 2, 3, 4]])
            assert row.work.executed - before == counter.get_total_flops()
            for _ in range(kept - 1):
                row.work.keep_draft()
            if not kept:
                row.work.drop_pass()
            row.page_table.shorten(start + kept)
            for token in range(1, kept + 1):
                next_logits(decoder, [plain], [[token]])
            assert row.work.executed - before == counter.get_total_flops()
            assert row.work.total == plain.work.total == plain.work.executed
            assert row.work.flops().model_copy(update={"drafts": 0}) == plain.work.flops()
            assert row.work.decode_steps == plain.work.decode_steps
            assert row.length == plain.length
        assert (row.work.drafted, row.work.accepted) == (12, 2 + 3)


@torch.inference_mode()
def test_what_is_not_kept_leaves_no_trace() -> None:
    decoder = repeating(1.0).decoder
    gc.collect()  # rows of other tests
    free = decoder.pool.free
    (row,), (plain,) = _prefilled(decoder, ["0-5"], [62]), _prefilled(decoder, ["0-5"], [62])
    drafted_logits(decoder, [row], [[1, 2, 3, 4, 5, 6]])
    row.page_table.clear_after(63)
    row.page_table.shorten(63)
    next_logits(decoder, [plain], [[1]])
    assert len(row.page_table.blocks) == len(plain.page_table.blocks) == 1
    for visit in range(6):
        for ours, theirs in zip(row.page_table.history(visit, 64), plain.page_table.history(visit, 64), strict=True):
            assert torch.allclose(ours[:, :63], theirs[:, :63], atol=1e-5)
            assert not ours[:, 63].any()
    assert torch.allclose(next_logits(decoder, [row], [[9]]), next_logits(decoder, [plain], [[9]]), atol=1e-4)
    row.page_table.release()
    plain.page_table.release()
    assert decoder.pool.free == free


@torch.inference_mode()
def test_a_pass_with_drafts_that_fails_is_counted_to_its_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = repeating(1.0).decoder
    (row,) = _prefilled(decoder, ["0-5"], [10])
    before, whole = row.work.total, row.work.next_token(11)
    finish, calls = decoder.kernels.finish, list[int]()

    def failing(w: Weights, x: Tensor, mixed: Tensor) -> Tensor:
        calls.append(len(calls))
        if len(calls) == 4:
            raise OSError
        return finish(w, x, mixed)

    monkeypatch.setattr(decoder.kernels, "finish", failing)
    with FlopCounterMode(display=False), pytest.raises(OSError):
        drafted_logits(decoder, [row], [[1, 2, 3]])
    layer = decoder.cost.layers[0]
    assert row.work.total - before == 3 * layer.flops(1, 11) < whole
    assert row.work.executed - before == 3 * layer.flops(3, 13)
    assert (row.length, row.drafted, row.work.decode_steps) == (10, 0, 0)


def test_what_a_request_may_waste_is_bounded() -> None:
    drafts = Drafts([1, 1, 1, 1], "prompt")
    wasted = 0
    for length in range(100):
        count = len(_proposed(drafts, [1] * length, 7, _known()).tokens)
        if count:
            drafts.judged(count, 0, Experience())
            wasted += count + 1
        assert wasted <= FREE_WASTE + WASTE_PER_TOKEN * length
    assert wasted > 150
