"""Many callers, one engine: the same answers as alone, fairness, bounds, cancellation, and nothing left behind."""

from __future__ import annotations

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import pytest

from polar_sdk.errors import CacheMemoryError, QueueFullError
from polar_sdk.programs.policy import Policy
from polar_sdk.serving.places import Limits
from polar_sdk.testing import tiny_model
from polar_sdk.usage import ListSink
from tests.sdk.serving.gate import LONG, all_pages_are_back, run_together

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.request.generation import Generation
    from polar_sdk.serving.job import Job

PROGRAMS = ["0-5", "0-1 3-5", "0-1 3x2 4-5", "0 2-5", "0-1 2~2 4-5"]


def test_callers_in_threads_get_what_they_would_get_alone() -> None:
    # No guard: whether a random layer's second visit breaches may hang on the last bit of a sum.
    model, alone = (tiny_model(policy=Policy.permissive()) for _ in range(2))
    prompts = [
        (f"{number} " + "word " * (1 + 7 * number), PROGRAMS[number % len(PROGRAMS)], 5 + number)
        for number in range(12)
    ]
    calls = [partial(model.generate, text, program=program, max_tokens=most) for text, program, most in prompts]
    together = run_together(calls)
    for done, (text, program, most) in zip(together, prompts, strict=True):
        expected = alone.generate(text, program=program, max_tokens=most)
        assert done.token_ids == expected.token_ids
        assert done.usage.flops == expected.usage.flops
    assert all_pages_are_back(model)


async def test_more_asyncio_callers_than_the_loop_has_threads() -> None:
    model = tiny_model()
    done = await asyncio.gather(*[model.agenerate(f"caller {number}", max_tokens=4) for number in range(50)])
    expected = [tiny_model().generate(f"caller {number}", max_tokens=4).text for number in (0, 49)]
    assert [done[0].text, done[49].text] == expected


def test_long_prompts_run_in_chunks_beside_those_who_decode() -> None:
    model, alone = tiny_model(context_window=2048), tiny_model(context_window=2048)
    model.scheduler.limits = Limits(prefill_beside=9, prefill_alone=30)
    texts = ["a" * 1200, "b", "c" * 510, "d" * 31]
    together = run_together([partial(model.generate, text, max_tokens=20) for text in texts])
    for done, text in zip(together, texts, strict=True):
        expected = alone.generate(text, max_tokens=20)
        assert done.token_ids == expected.token_ids
        # What a request costs does not depend on who else was served.
        assert (
            done.usage.flops
            == expected.usage.flops
            == model.cost(done.usage.program, prompt=done.usage.tokens.input, output=20)
        )
        assert done.usage.visits.prefill[0] == -(-done.usage.tokens.input // 512)


@pytest.mark.parametrize(("other", "most"), [(None, 40), ("acme", 10)])
def test_a_burst_of_prompts_is_read_in_few_passes(
    monkeypatch: pytest.MonkeyPatch, other: str | None, most: int
) -> None:
    """Unless another tenant is there, or was lately."""
    model = tiny_model()
    scheduler = model.scheduler
    scheduler.limits = Limits(prefill_beside=10, prefill_alone=30, pace=math.inf)
    read, run = list[int](), scheduler._run_chunks

    def noted(jobs: Sequence[Job], chunks: Sequence[Sequence[int]]) -> None:
        if any(job.decoding for job in scheduler._places.jobs):
            read.append(sum(map(len, chunks)))
        run(jobs, chunks)

    monkeypatch.setattr(scheduler, "_run_chunks", noted)
    with ThreadPoolExecutor() as threads:
        if other is not None:
            long = threads.submit(model.generate, "b", max_tokens=180, tenant=other)
            while not scheduler.sampled_tokens:
                time.sleep(0.001)
        model.generate_batch(["a" * 16] * 12, template="raw", max_tokens=30, tenant="burst")
    assert most <= max(read) < most + 16
    if other is not None:
        assert long.result().finish_reason
        assert len(read) >= 12


def test_rows_beyond_the_limit_wait_for_their_turn() -> None:
    model = tiny_model()
    model.scheduler.limits = Limits(max_rows=2)
    done = model.generate_batch([f"prompt {number}" for number in range(7)], max_tokens=5)
    alone = tiny_model()
    assert [answer.text for answer in done] == [
        alone.generate(f"prompt {number}", max_tokens=5).text for number in range(7)
    ]


def test_a_full_queue_refuses_and_computes_nothing() -> None:
    sink = ListSink()
    model = tiny_model(sink=sink)
    model.scheduler.limits = Limits(max_waiting=3)
    with pytest.raises(QueueFullError, match=r"4 .*3") as caught:
        model.generate_batch(["a", "b", "c", "d"], max_tokens=2)
    assert caught.value.retryable
    assert [record.flops.total for record in sink.records] == [0] * 4
    assert {record.error for record in sink.records} == {"QueueFullError"}
    assert model.generate("a", max_tokens=2).finish_reason


def test_a_row_that_fails_fails_alone() -> None:
    sink = ListSink()
    model = tiny_model(sink=sink)

    class Broken:
        looks = 0

        def is_set(self) -> bool:
            self.looks += 1
            if self.looks > 3:
                raise RuntimeError("the caller's cancel is broken")
            return False

    def broken() -> Generation | None:
        with pytest.raises(RuntimeError, match="cancel is broken"):
            model.generate("a", max_tokens=LONG, cancel=Broken())
        return None

    _, other = run_together([broken, lambda: model.generate("b", max_tokens=30)])
    assert other is not None
    assert other.token_ids == tiny_model().generate("b", max_tokens=30).token_ids
    assert sorted(record.outcome for record in sink.records) == ["completed", "error"]
    assert all_pages_are_back(model)


def test_what_can_never_fit_is_refused_and_the_next_is_served() -> None:
    sink = ListSink()
    model = tiny_model(sink=sink, kv_memory=6 * 2 * 2 * 64 * 12 * 4 * 2)  # two pages of 64 tokens for each layer
    with pytest.raises(CacheMemoryError, match="MiB"):
        model.generate("a" * 200, max_tokens=100)
    assert sink.records[0].flops.total == 0
    assert model.generate("a" * 50, max_tokens=20).usage.tokens.input > 50
    assert all_pages_are_back(model)


def test_memory_is_promised_before_a_row_is_let_in() -> None:
    """Room for one request at a time: all are served, one after another, and none breaks off."""
    model = tiny_model(kv_memory=6 * 2 * 2 * 64 * 12 * 4 * 2)
    done = model.generate_batch(["a" * 60, "b" * 60, "c" * 60], max_tokens=50)
    alone = tiny_model()
    assert [answer.token_ids for answer in done] == [
        alone.generate(letter * 60, max_tokens=50).token_ids for letter in "abc"
    ]
