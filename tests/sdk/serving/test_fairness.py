"""Fairness between tenants, in passes and tokens: who waits, who gives way, what runs again, and who pays for it."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import ExitStack, closing
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from polar_sdk.engine import forward
from polar_sdk.errors import InvalidRequestError, QueueFullError
from polar_sdk.programs.policy import Policy
from polar_sdk.serving import scheduler as module
from polar_sdk.serving.pace import Pace, PassTimes
from polar_sdk.serving.places import TURN, Limits
from polar_sdk.serving.queue import Clocks
from polar_sdk.testing import tiny_model
from polar_sdk.usage import ListSink
from tests.sdk.serving.gate import LONG, Gate, all_pages_are_back, in_thread, never_ending

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from torch import Tensor

    from polar_sdk.engine.layout import Members
    from polar_sdk.model import PolarModel
    from polar_sdk.request.generation import Chunk, Generation
PAGE_BYTES = 2 * 2 * 64 * 12 * 4
PROGRAMS = ["0-5", "0-1 3-5", "0-1 3x2 4-5", "0 2-5", "0-1 2~2 4-5"]


class Pass(NamedTuple):
    """One pass of the engine: new tokens per tenant."""

    tokens: dict[str, int]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    """The passes that the engine runs."""
    log: list[Pass] = []
    charge = module.Scheduler._charge
    lengths: dict[Any, int] = {}

    def noted(self: module.Scheduler, jobs: Sequence[Any]) -> None:
        tokens: Counter[str] = Counter()
        for job in jobs:
            tokens[job.request.tenant] += job.row.length - lengths.get(job, 0)
            lengths[job] = job.row.length
        log.append(Pass(dict(tokens)))
        charge(self, jobs)

    monkeypatch.setattr(module.Scheduler, "_charge", noted)
    return log


def paused(model: PolarModel, count: int, tenant: str, **options: Any) -> list[Generator[Chunk, None, None]]:
    """Streams of which one piece is read."""
    streams = []
    for number in range(count):
        streams.append(model.stream(f"{number} {never_ending()}", max_tokens=60, tenant=tenant, **options))
        next(streams[-1])
    return streams


def finished(stream: Generator[Chunk, None, None]) -> Generation:
    """Read a stream to its end."""
    last = list(stream)[-1].generation
    assert last is not None
    return last


class TestPausedReaders:
    def test_they_give_way_to_another_tenant(self) -> None:
        model = tiny_model()
        model.scheduler.limits = Limits(max_rows=4)
        streams = paused(model, 4, "noisy")
        done: list[Generation] = []
        thread = in_thread(lambda: done.append(model.generate("hello", max_tokens=20, tenant="quiet")))
        thread.join(60)
        assert done[0].token_ids == tiny_model().generate("hello", max_tokens=20).token_ids
        alone = tiny_model()
        for number, stream in enumerate(streams):
            expected = alone.generate(f"{number} {never_ending()}", max_tokens=60)
            assert finished(stream).token_ids == expected.token_ids
        assert model.scheduler.replayed_flops == 0  # there was memory enough to keep their pages

    def test_they_give_way_to_their_own_tenant(self) -> None:
        model = tiny_model()
        model.scheduler.limits = Limits(max_rows=2)
        with ExitStack() as stack:
            for stream in paused(model, 7, "noisy"):
                stack.enter_context(closing(stream))
            assert len(model.scheduler) == 7
        assert len(model.scheduler) == 0 or all_pages_are_back(model)

    def test_what_runs_again_is_executed_and_not_charged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sink = ListSink()
        model = tiny_model(sink=sink, kv_memory=6 * PAGE_BYTES * 4)  # four blocks of 64 tokens
        model.scheduler.limits = Limits(max_rows=2, prefix_share=0)
        run, counted, padding = model.scheduler._run_passes, list[int](), list[int]()
        attend = forward._attend_together

        def attending(members: Members, *rest: Any) -> Tensor:
            """Rows of similar length attend as if they were of one; what that adds is executed, and no row's."""
            per_key = model.loaded.decoder.cost.layers[members.step.first].attention
            padding.extend(per_key * (band.longest - length) for band in members.bands for length in band.lengths)
            return attend(members, *rest)

        monkeypatch.setattr(forward, "_attend_together", attending)

        def counting() -> bool:
            with FlopCounterMode(display=False) as counter:
                ran = run()
            counted.append(counter.get_total_flops())
            return ran

        model.scheduler._run_passes = counting  # type: ignore[method-assign]
        streams = paused(model, 2, "noisy", program="0-5")
        for _ in range(2):
            model.generate("b" * 150, max_tokens=20, tenant="quiet", program="0-5")
            for stream in streams:
                next(stream), next(stream)
        answers = [finished(stream) for stream in streams]
        model.scheduler.close()
        alone = tiny_model()
        for number, answer in enumerate(answers):
            expected = alone.generate(f"{number} {never_ending()}", max_tokens=60, program="0-5")
            assert answer.token_ids == expected.token_ids
            assert answer.usage.flops == expected.usage.flops
            assert answer.usage.visits == expected.usage.visits
            assert answer.usage.tokens == expected.usage.tokens
            assert answer.usage.kv_bytes_peak == expected.usage.kv_bytes_peak
        assert model.scheduler.replayed_flops > 0
        charged = sum(record.flops.total for record in sink.records)
        assert charged + model.scheduler.replayed_flops + sum(padding) == sum(counted)
        assert all_pages_are_back(model)

    def test_a_stream_closed_without_its_pages_is_recorded_exactly(self) -> None:
        sink = ListSink()
        model = tiny_model(sink=sink, kv_memory=6 * PAGE_BYTES * 2)
        model.scheduler.limits = Limits(max_rows=2, prefix_share=0)
        (stream,) = paused(model, 1, "noisy", program="0-5")
        model.generate("b" * 90, max_tokens=20, tenant="quiet", program="0-5")
        stream.close()
        record = sink.records[-1]
        assert record.tenant == "noisy"
        assert record.flops == model.cost("0-5", prompt=record.tokens.input, output=record.tokens.output)
        assert record.kv_bytes_peak == 6 * PAGE_BYTES
        assert all_pages_are_back(model)

    def test_a_stopped_loop_stays_stopped_where_it_was(self) -> None:
        policy = Policy.model_validate({**Policy.permissive().model_dump(), "loop_guard": {"min_cosine": 0.9}})
        texts = [f"{letter} {never_ending()}" for letter in "abcdef"]
        alone, model = tiny_model(policy=policy), tiny_model(policy=policy, kv_memory=7 * PAGE_BYTES * 2)
        model.scheduler.limits = Limits(max_rows=1, prefix_share=0)
        stopped = 0
        for text in texts:
            expected = alone.generate(text, max_tokens=40, program="0-1 3x2 4-5")
            stream = model.stream(text, max_tokens=40, program="0-1 3x2 4-5")
            for _ in range(9):
                next(stream)
            model.generate("b" * 90, max_tokens=5, tenant="quiet", program="0-5")
            answer = finished(stream)
            assert answer.token_ids == expected.token_ids
            assert answer.usage.flops == expected.usage.flops
            stopped += answer.usage.loops_stopped
        assert model.scheduler.replayed_flops > 0
        assert stopped > 0

    @settings(max_examples=5)
    @given(st.data())
    def test_random_pauses_change_no_answer(self, data: st.DataObject) -> None:
        rows, blocks = data.draw(st.integers(1, 3)), data.draw(st.integers(3, 6))
        model = tiny_model(kv_memory=6 * PAGE_BYTES * blocks, policy=Policy.permissive())
        model.scheduler.limits = Limits(max_rows=rows, prefix_share=data.draw(st.sampled_from([0.0, 0.3])))
        asked: list[dict[str, Any]] = [
            {
                "prompt": f"{number}" + "x" * data.draw(st.integers(0, 100)),
                "max_tokens": data.draw(st.integers(3, 50)),
                "program": data.draw(st.sampled_from(PROGRAMS)),
                "tenant": data.draw(st.sampled_from("AB")),
                "temperature": data.draw(st.sampled_from([0.0, 0.7])),
                "seed": number,
            }
            for number in range(data.draw(st.integers(2, 5)))
        ]
        streams = [model.stream(**options) for options in asked]
        answers: dict[int, Generation] = {}
        while len(answers) < len(streams):
            index = data.draw(st.sampled_from([index for index in range(len(streams)) if index not in answers]))
            for _ in range(data.draw(st.integers(1, 12))):
                if index not in answers and (answer := next(streams[index]).generation) is not None:
                    answers[index] = answer
        alone = reference()
        for index, options in enumerate(asked):
            expected = alone.generate(**options)
            assert answers[index].token_ids == expected.token_ids
            assert answers[index].usage.tokens.output == expected.usage.tokens.output
            assert answers[index].usage.visits.decode == expected.usage.visits.decode
        assert all_pages_are_back(model)


@cache
def reference() -> PolarModel:
    model = tiny_model(policy=Policy.permissive())
    model.scheduler.limits = Limits(prefix_share=0)
    return model


class Flood:
    """Requests of one tenant that run and wait, held in the middle of a pass until `open`."""

    def __init__(self, model: PolarModel, count: int, tenant: str = "noisy", **options: Any) -> None:
        self.gate = Gate(3)
        prompts = [f"{number} {never_ending()}" for number in range(count)]
        hooks: list[Any] = [{"logits_hook": self.gate}, *[{}] * (count - 1)]
        self.thread = in_thread(
            lambda: model.generate_batch(prompts, each=hooks, tenant=tenant, **{"max_tokens": LONG, **options})
        )
        assert self.gate.reached.wait(60)


def waiting(model: PolarModel, count: int) -> None:
    """Until that many requests wait or run."""
    reached = threading.Event()
    while len(model.scheduler) < count:
        reached.wait(0.001)


class TestFlood:
    def test_another_tenants_first_token_comes_in_the_next_pass(self, passes: list[Pass]) -> None:
        model = tiny_model()
        model.scheduler.limits = Limits(max_rows=8)
        flood = Flood(model, 60, max_tokens=30)
        done: list[Generation] = []
        begun = len(passes)
        thread = in_thread(lambda: done.append(model.generate("hello", max_tokens=20, tenant="quiet")))
        waiting(model, 61)
        flood.gate.opened.set()
        thread.join(60)
        first = next(number for number, ran in enumerate(passes[begun:]) if "quiet" in ran.tokens)
        assert first <= 1  # the pass that is under way, and then
        assert set(passes[begun + first].tokens) == {"quiet"}  # its prompt, beside no prompt of the flood
        last = max(number for number, ran in enumerate(passes[begun:]) if "quiet" in ran.tokens)
        decoded = [ran for ran in passes[begun + first + 1 : begun + last + 1] if "quiet" in ran.tokens]
        assert len(decoded) == 19
        # One pass over prompts and one of decoding per round at most.
        assert last - first <= 2 * 20
        flood.thread.join(60)

    @pytest.mark.parametrize(("weights", "share"), [({}, 4), ({"quiet": 3.0}, 6)])
    def test_places_are_shared_by_weight_while_both_wait(
        self, passes: list[Pass], weights: dict[str, float], share: int
    ) -> None:
        model = tiny_model()
        model.scheduler.limits = Limits(max_rows=8, weights=weights)
        flood = Flood(model, 16, max_tokens=60)
        begun = len(passes)
        other = in_thread(lambda: model.generate_batch([never_ending()] * 16, max_tokens=60, tenant="quiet"))
        waiting(model, 32)
        flood.gate.opened.set()
        for thread in (flood.thread, other):
            thread.join(120)
        decoding = [ran.tokens for ran in passes[begun + 12 : begun + 60] if max(ran.tokens.values()) <= 8]
        assert max(tokens.get("quiet", 0) for tokens in decoding) == share
        assert max(tokens.get("noisy", 0) for tokens in decoding) == 8 - share

    def test_a_tenant_alone_uses_every_place(self, passes: list[Pass]) -> None:
        model = tiny_model()
        model.scheduler.limits = Limits(max_rows=8)
        model.generate_batch(["hello"] * 20, max_tokens=30, tenant="noisy")
        assert max(ran.tokens["noisy"] for ran in passes if max(ran.tokens.values()) <= 8) == 8

    def test_more_tenants_than_places_take_turns(self, passes: list[Pass]) -> None:
        model = tiny_model()
        model.scheduler.limits = Limits(max_rows=2)
        flood = Flood(model, 2, tenant="0")
        threads = [in_thread(partial(model.generate, never_ending(), max_tokens=LONG, tenant=name)) for name in "1234"]
        waiting(model, 6)
        flood.gate.opened.set()
        for thread in (flood.thread, *threads):
            thread.join(120)
        tokens: Counter[str] = Counter()
        spread = 0
        for ran in passes:
            tokens.update(ran.tokens)
            if min(tokens[name] for name in "1234") < LONG:
                spread = max(spread, max(tokens[name] for name in "1234") - min(tokens[name] for name in "1234"))
        # Everyone is at most a turn, and the turns of those who take the other place, ahead of another.
        assert spread <= 2 * TURN + 30
        assert all(tokens[name] >= LONG - 1 for name in "1234")


class TestPace:
    """Bounds of the time that rows of others add to a token of the tenant that has least to decode."""

    @settings(max_examples=60)
    @given(
        rows=st.lists(st.integers(1, 32), min_size=2, max_size=5),
        times=st.floats(1.2, 10),
        fixed=st.floats(0, 1),
        per_row=st.floats(0.01, 1),
        prompts=st.lists(st.integers(0, 40), min_size=4, max_size=4),
    )
    @example(rows=[2, 28], times=8.0, fixed=1.0, per_row=1.0, prompts=[0, 0, 0, 0])  # earns more a round than its burst
    def test_it_is_bounded_and_nobody_stands_still(
        self, rows: list[int], times: float, fixed: float, per_row: float, prompts: list[int]
    ) -> None:
        rounds, pace, chunk = 2000, Pace(), 0.5
        tenants = {str(number): float(count) for number, count in enumerate(sorted(rows))}
        alone = fixed + per_row * tenants["0"]
        owed = dict(zip([*tenants][1:], prompts, strict=False))  # chunks of prompts; the one with least has none
        decoded, total, idle = dict.fromkeys(tenants, 0), 0.0, 0
        # Rows come one after another, so that passes of several sizes have been measured.
        pace.decoded({"0": tenants["0"]}, alone, {})
        for _ in range(rounds):
            pace.begin(tenants, times)
            going = [tenant for tenant in tenants if pace.may_run(tenant)]
            idle += not going
            for tenant in going:
                if owed.get(tenant):
                    owed[tenant] -= 1
                    pace.read({tenant: 512}, chunk, {})
                    total += chunk
                decoded[tenant] += 1
            took = fixed + per_row * sum(tenants[tenant] for tenant in going)
            pace.decoded({tenant: tenants[tenant] for tenant in going}, took, {})
            total += took
        assert not idle
        assert decoded["0"] == rounds
        ahead = len(tenants) * (5 * times * alone + chunk + per_row * 32) + 60 * (fixed + per_row * sum(rows))
        assert (
            total
            <= 1.1 * times * alone * rounds + ahead + per_row * sum(min(count, tenants["0"]) for count in rows) * rounds
        )
        for tenant, count in tenants.items():
            due = max(per_row * tenants["0"], (times - 1) * alone / (len(tenants) - 1)) * rounds
            due -= chunk * dict(zip([*tenants][1:], prompts, strict=False)).get(tenant, 0) + ahead
            assert decoded[tenant] * per_row * count >= min(0.8 * due, 0.8 * per_row * count * rounds)

    @given(fixed=st.floats(0, 1), per_row=st.floats(0.01, 1), sizes=st.lists(st.integers(1, 32), min_size=2))
    def test_what_a_row_adds_is_learned(self, fixed: float, per_row: float, sizes: list[int]) -> None:
        times = PassTimes()
        for size in sizes:
            times.measured(size, fixed + per_row * size)
        if len(set(sizes)) > 1 and max(sizes) - min(sizes) >= 3:
            assert times.per_row == pytest.approx(per_row, rel=0.01) or times.per_row <= per_row
        assert 0 <= times.of(1) <= fixed + per_row * max(sizes) + 1e-9

    def test_a_crowd_sits_out_beside_one_row(self, passes: list[Pass], monkeypatch: pytest.MonkeyPatch) -> None:
        # As if each row took a tenth of a second, and a pass nothing: beside one row, one other.
        monkeypatch.setattr(PassTimes, "per_row", 0.1)
        monkeypatch.setattr(PassTimes, "of", lambda self, rows: 0.1 * rows)
        monkeypatch.setattr(Pace, "read", lambda self, tokens, seconds, weights: None)
        model = tiny_model()
        model.scheduler.limits = Limits(max_rows=8, pace=2.0)
        flood = Flood(model, 8, max_tokens=80, program="0-5")
        begun = len(passes)
        one = in_thread(lambda: model.generate(never_ending(), max_tokens=60, tenant="quiet", program="0-5"))
        waiting(model, 9)
        flood.gate.opened.set()
        for thread in (flood.thread, one):
            thread.join(60)
        places = [number for number, ran in enumerate(passes) if number >= begun and "quiet" in ran.tokens]
        beside: Counter[str] = Counter()
        for ran in passes[places[1] : places[-1]]:
            beside.update(ran.tokens)
        assert beside["quiet"] >= 50
        assert beside["noisy"] <= 1.1 * beside["quiet"] + 8 + 8
        assert beside["noisy"] >= 0.7 * beside["quiet"]

    def test_clocks_of_tenants_long_gone_are_forgotten(self) -> None:
        clocks = Clocks()
        for number in range(20_000):
            clocks.arrive(str(number), ["here"])
            clocks.advance(str(number), 1e12 + number)
            clocks.advance("here", 1e6)
        assert len(clocks._clocks) <= 4097
        assert clocks["19999"] > 1e12
        clocks.arrive("19999", ["here"])
        assert clocks["19999"] > 1e12  # who has had much and comes back at once is not new


class TestQueue:
    def test_a_full_queue_makes_room_for_a_tenant_that_has_less_in_it(self) -> None:
        sink = ListSink()
        model = tiny_model(sink=sink)
        model.scheduler.limits = Limits(max_rows=1, max_waiting=4)
        flood = Flood(model, 1, max_tokens=8)
        failed: list[QueueFullError] = []

        def ask(tenant: str) -> None:
            try:
                model.generate("x", max_tokens=2, tenant=tenant)
            except QueueFullError as error:
                failed.append(error)

        threads = []
        for count in range(4):
            threads.append(in_thread(lambda: ask("noisy")))
            waiting(model, count + 2)
        with pytest.raises(QueueFullError, match="4"):
            model.generate("x", tenant="noisy")
        threads.append(in_thread(lambda: ask("quiet")))
        while not any(job.left for job in list(model.scheduler._open)):
            threads[-1].join(0.001)
        flood.gate.opened.set()
        for thread in (*threads, flood.thread):
            thread.join(60)
        (error,) = failed
        assert "another tenant's took its place" in str(error)
        assert error.retryable
        outcomes = Counter((record.tenant, record.outcome) for record in sink.records)
        assert outcomes == {("noisy", "completed"): 4, ("noisy", "error"): 2, ("quiet", "completed"): 1}

    def test_streams_that_nobody_reads_are_bounded(self) -> None:
        model = tiny_model()
        model.scheduler.limits = Limits(max_rows=2, max_waiting=5)
        streams = paused(model, 7, "noisy")
        with pytest.raises(QueueFullError):
            model.generate("x", tenant="noisy")
        done: list[Generation] = []
        thread = in_thread(lambda: done.append(model.generate("hello", max_tokens=3, tenant="quiet")))
        thread.join(60)
        assert done
        ends: list[object] = []
        for stream in streams:
            try:
                ends.append(finished(stream).finish_reason)
            except QueueFullError as error:
                ends.append(type(error))
        assert ends.count(QueueFullError) == 1

    def test_who_has_had_less_work_is_next(self, passes: list[Pass]) -> None:
        """By work, not by number of requests: the tenant of short requests gets more of them."""
        model = tiny_model()
        model.scheduler.limits = Limits(max_rows=1)
        flood = Flood(model, 1, max_tokens=8)
        calls = [("long", 100)] * 4 + [("short", 10)] * 8
        threads = []
        for count, (tenant, tokens) in enumerate(calls):
            threads.append(in_thread(partial(model.generate, never_ending(), max_tokens=tokens, tenant=tenant)))
            waiting(model, count + 2)
        flood.gate.opened.set()
        for thread in (*threads, flood.thread):
            thread.join(60)
        order = [name for ran in passes for name in ran.tokens if name != "noisy"]
        second_long = 100 + next(place for place, _ in enumerate(order) if Counter(order[:place])["long"] == 100)
        assert Counter(order[: second_long + 50])["short"] >= 70

    @pytest.mark.parametrize(
        "limits", [{"weights": {"a": 0.0}}, {"weights": {"a": float("nan")}}, {"pace": 0.5}, {"max_rows": 0}]
    )
    def test_limits_that_would_stop_everything_are_refused(self, limits: dict[str, Any]) -> None:
        with pytest.raises(InvalidRequestError, match="use"):
            Limits(**limits)
