"""Shared starts of prompts: the same answer for less compute, never across tenants or programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_sdk.cli.run import footer
from polar_sdk.model import PolarModel
from polar_sdk.programs.program import Program
from polar_sdk.serving.places import Limits
from polar_sdk.testing import random_fill, tiny_model
from tests.sdk.serving.gate import all_pages_are_back

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.request.generation import Generation
    from polar_sdk.serving.job import Job

START = "You are a careful assistant. " * 6  # 174 tokens: two full pages


@pytest.fixture
def model() -> PolarModel:
    return tiny_model()


def test_a_shared_start_is_cached_and_changes_no_answer(model: PolarModel) -> None:
    first = model.generate(START + "one", max_tokens=8)
    second = model.generate(START + "two", max_tokens=8)
    uncached = tiny_model().generate(START + "two", max_tokens=8)
    assert (first.usage.tokens.cached, second.usage.tokens.cached) == (0, 175)
    assert second.token_ids == uncached.token_ids
    assert " · 179+8 tokens, 175 of them cached · " in footer(second)
    assert "cached" not in footer(first)
    assert second.usage.tokens.input == uncached.usage.tokens.input
    assert second.usage.flops.layers_prefill < uncached.usage.flops.layers_prefill
    cost = model.loaded.decoder.cost
    program = model.policy.tiers["standard"].program
    assert second.usage.flops == cost.request(program, uncached.usage.tokens.input, 8, cached=175)


@pytest.mark.parametrize("other", [{"tenant": "globex"}, {"program": "0-1 3-5"}, {"compute": "economy"}])
def test_nothing_is_shared_across_tenants_or_programs(model: PolarModel, other: dict[str, str]) -> None:
    model.generate(START, max_tokens=2, tenant="acme")
    assert model.generate(START, max_tokens=2, **{"tenant": "acme", **other}).usage.tokens.cached == 0  # type: ignore[arg-type]


def test_a_share_of_zero_turns_it_off(model: PolarModel) -> None:
    model.scheduler.limits = Limits(prefix_share=0)
    model.generate(START, max_tokens=2)
    assert model.generate(START, max_tokens=2).usage.tokens.cached == 0


def test_the_least_recently_used_start_goes_first() -> None:
    page = 2 * 2 * 64 * 12 * 4
    model = tiny_model(kv_memory=6 * page * 12)
    model.scheduler.limits = Limits(prefix_share=0.5)
    pool = model.loaded.decoder.pool
    program = "0-5"
    for letter in "abcdef":  # two pages per layer each, of which six stay
        model.generate(letter * 140, template="raw", program=program, max_tokens=2)
    assert pool.size - pool.free <= pool.size // 2
    assert model.generate("a" * 140, template="raw", program=program, max_tokens=2).usage.tokens.cached == 0
    assert model.generate("f" * 140, template="raw", program=program, max_tokens=2).usage.tokens.cached == 128


def test_kept_pages_make_room_for_running_requests() -> None:
    page = 2 * 2 * 64 * 12 * 4
    model = tiny_model(kv_memory=6 * page * 4)
    model.scheduler.limits = Limits(prefix_share=1.0)
    for letter in "abc":
        done = model.generate(letter * 180, template="raw", program="0-5", max_tokens=40)
        assert (
            done.token_ids
            == tiny_model().generate(letter * 180, template="raw", program="0-5", max_tokens=40).token_ids
        )


class TestFills:
    """The last tokens of a prompt run a filled layer; where another prompt goes on, the same tokens are filled."""

    @staticmethod
    def filled(**settings: Any) -> PolarModel:
        model = tiny_model(**settings)
        segments = ((3, 5), (1, 2), (4, 5))
        model.decoder.set_fills({segment: random_fill(model.decoder, segment) for segment in segments})
        return PolarModel(model.loaded, policy=model.policy, ledger=None)

    @pytest.mark.parametrize("program", ["0-2 (3-5)", "0 (1-2) 3 (4-5)"])
    @pytest.mark.parametrize(("length", "cached"), [(128, 127), (129, 128), (135, 128), (190, 189)])
    def test_tokens_that_ran_are_not_shared_as_filled_ones(self, length: int, cached: int, program: str) -> None:
        model = self.filled()
        text = "abcdefghij" * 30
        model.generate(text[:length], template="raw", program=program, max_tokens=2)
        longer = model.generate(text, template="raw", program=program, max_tokens=8)
        assert longer.usage.tokens.cached == cached
        assert longer.token_ids == self.filled().generate(text, template="raw", program=program, max_tokens=8).token_ids
        assert longer.usage.flops == model.decoder.cost.request(Program.parse(program), 300, 8, cached=cached)

    @pytest.mark.parametrize("program", ["0-2 (3-5:8)", "0 (1-2:8) 3 (4-5:8)"])
    @pytest.mark.parametrize(("length", "cached"), [(193, 185), (200, 192)])
    def test_filled_tokens_are_not_shared_as_ones_that_run(self, length: int, cached: int, program: str) -> None:
        model = self.filled()
        text = "abcdefghij" * 30
        model.generate(text, template="raw", program=program, max_tokens=2)
        shorter = model.generate(text[:length], template="raw", program=program, max_tokens=8)
        assert shorter.usage.tokens.cached == cached
        alone = self.filled().generate(text[:length], template="raw", program=program, max_tokens=8)
        assert shorter.token_ids == alone.token_ids

    def test_a_prompt_that_is_shorter_than_its_tail_shares_nothing(self) -> None:
        model, program, text = self.filled(), "0-2 (3-5:64)", "abcdefghij" * 20
        model.generate(text, template="raw", program=program, max_tokens=2)
        short = model.generate(text[:50], template="raw", program=program, max_tokens=8)
        assert short.usage.tokens.cached == 0
        alone = self.filled().generate(text[:50], template="raw", program=program, max_tokens=8)
        assert short.token_ids == alone.token_ids

    def test_other_maps_share_nothing(self) -> None:
        model, program = self.filled(), "0-2 (3-5)"
        model.generate(START, program=program, max_tokens=2)
        model.decoder.set_fills({(3, 5): random_fill(model.decoder, (3, 5), seed=1)})
        assert model.generate(START, program=program, max_tokens=2).usage.tokens.cached == 0


class TestPartsOfBlocks:
    """The tokens before which two prompts part in a block are copied."""

    @staticmethod
    def ask(model: PolarModel, text: str, **options: Any) -> Generation:
        return model.generate(text, template="raw", **{"program": "0-5", "max_tokens": 4, **options})

    @staticmethod
    def kept(model: PolarModel) -> int:
        """Number of blocks kept, of six visits each."""
        pool = model.loaded.decoder.pool
        return (pool.size - pool.free) // 6

    @pytest.mark.parametrize(("common", "cached"), [(15, 0), (16, 16), (40, 40), (63, 63), (64, 64), (100, 100)])
    def test_a_start_is_shared_to_the_token(self, model: PolarModel, common: int, cached: int) -> None:
        first, second = ("".join(chr(40 + place % 80) for place in range(common)) + letter * 30 for letter in "yz")
        self.ask(model, first)
        shared, alone = self.ask(model, second), self.ask(tiny_model(), second)
        assert shared.usage.tokens.cached == cached
        assert shared.token_ids == alone.token_ids
        cost = model.loaded.decoder.cost
        assert shared.usage.flops == cost.request(Program.parse("0-5"), common + 30, 4, cached=cached)

    def test_it_is_the_longest_that_any_prompt_has(self, model: PolarModel) -> None:
        self.ask(model, "a" * 20 + "b" * 40)
        self.ask(model, "a" * 40 + "c" * 20)
        self.ask(model, "a" * 30 + "d" * 30)
        assert self.ask(model, "a" * 35 + "e" * 20).usage.tokens.cached == 35

    def test_short_prompts_that_begin_alike_keep_one_block(self, model: PolarModel) -> None:
        for letter in "abcdefgh":
            self.ask(model, "x" * 40 + letter * 10)
        assert self.kept(model) == 1

    def test_only_the_last_used_parts_stay(self, model: PolarModel) -> None:
        letters = "abcdefghijklmnopqrst"
        for letter in letters:
            self.ask(model, letter * 50)
        assert self.kept(model) == 8
        assert self.ask(model, "l" * 50).usage.tokens.cached == 0
        assert self.ask(model, "t" * 50).usage.tokens.cached == 49

    def test_the_row_that_is_copied_from_goes_on_to_write(self, model: PolarModel) -> None:
        texts = ["x" * 40 + letter * 10 for letter in "abcdef"]
        stream = model.stream(texts[0], template="raw", program="0-5", max_tokens=60)
        next(stream)
        others = [self.ask(model, text, max_tokens=20) for text in texts[1:]]
        first = "".join(chunk.text for chunk in stream)
        assert [other.usage.tokens.cached for other in others] == [40] * 5
        assert [other.token_ids for other in others] == [
            self.ask(tiny_model(), text, max_tokens=20).token_ids for text in texts[1:]
        ]
        assert self.ask(tiny_model(), texts[0], max_tokens=60).text.endswith(first)

    @pytest.mark.parametrize("program", ["0-2 (3-5:8)", "0-5"])
    @given(data=st.data())
    @settings(max_examples=8)
    def test_answers_and_figures_are_those_of_the_prompt_alone(self, program: str, data: st.DataObject) -> None:
        model, alone = TestFills.filled(), TestFills.filled()
        alone.scheduler.limits = Limits(prefix_share=0)
        model.scheduler.limits = Limits(prefix_share=data.draw(st.sampled_from([0.05, 0.5])))
        parts = st.sampled_from(["a" * 20, "b" * 33, "c" * 64, "d" * 7])
        for _ in range(5):
            text = "".join(data.draw(st.lists(parts, min_size=1, max_size=4)))
            got, expected = (self.ask(each, text, program=program) for each in (model, alone))
            assert got.token_ids == expected.token_ids
            cost, cached = model.decoder.cost, got.usage.tokens.cached
            output = got.usage.tokens.output
            assert got.usage.flops == cost.request(Program.parse(program), len(text), output, cached=cached)
        assert all_pages_are_back(model)


class TestPromptsThatComeTogether:
    """One of those that share a prefix runs it, and the others wait for it, if that is worth a pass."""

    @staticmethod
    def batch(model: PolarModel, texts: Sequence[str], **options: Any) -> list[Generation]:
        return model.generate_batch(texts, template="raw", **{"program": "0-5", "max_tokens": 6, **options})

    def test_a_text_runs_once_for_all_questions_about_it(self, model: PolarModel) -> None:
        texts = ["t" * 300 + letter * (10 + place) for place, letter in enumerate("abcdefgh")]
        together = self.batch(model, texts)
        assert [done.usage.tokens.cached for done in together] == [0] + 7 * [300]
        cost = model.loaded.decoder.cost
        for text, done in zip(texts, together, strict=True):
            assert done.token_ids == self.batch(tiny_model(), [text])[0].token_ids
            request = cost.request(Program.parse("0-5"), len(text), 6, cached=done.usage.tokens.cached)
            assert done.usage.flops == request

    def test_a_long_text_runs_in_chunks_before_the_others_go_on(self) -> None:
        model = tiny_model(context_window=1024)
        texts = ["t" * 600 + letter * 20 for letter in "abc"]
        assert [done.usage.tokens.cached for done in self.batch(model, texts)] == [0, 600, 600]

    def test_little_in_common_is_not_waited_for(self, model: PolarModel) -> None:
        texts = ["t" * 40 + letter * 20 for letter in "abcd"]  # 3 × 40 tokens
        assert [done.usage.tokens.cached for done in self.batch(model, texts)] == [0] * 4
        texts.append("t" * 40 + "e" * 20)
        assert [done.usage.tokens.cached for done in self.batch(tiny_model(), texts)] == [0, 40, 40, 40, 40]

    def test_where_nothing_can_be_kept_they_wait_once(self) -> None:
        model = tiny_model(kv_memory=6 * 2 * 2 * 64 * 12 * 4 * 12)
        model.scheduler.limits = Limits(prefix_share=0.05)
        passes, read = [], model.scheduler._passes.read

        def counted(jobs: Sequence[Job], *rest: Any) -> None:
            passes.append(len(jobs))
            read(jobs, *rest)

        with patch.object(model.scheduler._passes, "read", counted):
            together = self.batch(model, ["t" * 90 + letter * 10 for letter in "abc"])
        assert [done.usage.tokens.cached for done in together] == [0, 0, 0]
        assert passes == [1, 2]

    def test_who_waits_goes_on_when_the_first_one_is_cancelled(self, model: PolarModel) -> None:
        texts = ["t" * 300 + letter * 10 for letter in "abcd"]
        streams = [model.stream(text, template="raw", program="0-5", max_tokens=6, tenant="acme") for text in texts]
        streams[0].close()
        answers = ["".join(chunk.text for chunk in stream) for stream in streams[1:]]
        alone = tiny_model()
        assert answers == [self.batch(alone, [text], tenant=text[-10:])[0].text for text in texts[1:]]
