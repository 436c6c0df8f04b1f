"""Programs inside a real vLLM, on the CPU, in the environment that `make vllm-env` makes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.vllm import DEEP, LIGHT, Bench, some_fill

if TYPE_CHECKING:
    from collections.abc import Iterator

ENV = Path(__file__).parents[3] / ".vllm"
pytestmark = [
    pytest.mark.long,
    pytest.mark.model,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not (ENV / "bin/vllm").exists(), reason="no vLLM in .vllm; `make vllm-env` installs it"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield Bench(ENV, tmp_path_factory.mktemp("vllm"))
    patch.undo()


def test_tokens_are_those_of_vllm_at_full_depth_and_of_our_engine_where_filled(bench: Bench) -> None:
    found = bench.tokens(12)
    assert found["identity_equal"] == 1
    assert found["filled_equal"] >= 0.995


def test_random_batches_with_few_blocks_answer_as_each_request_alone(bench: Bench) -> None:
    assert bench.schedules(12) == {"schedules_equal": 1.0, "cross_program_hits": 0.0}


def test_bills_are_those_of_the_engine_and_close_with_what_the_worker_counted(bench: Bench) -> None:
    assert bench.bills() == {"billed_equal": 1.0, "audit_closes": 1.0}


def test_what_cannot_run_is_refused_and_the_next_request_is_answered(bench: Bench) -> None:
    fine: dict[str, Any] = {"ids": bench.model.encode("The sea was calm that day. " * 9), "tokens": 2, "program": LIGHT}
    wrong: list[dict[str, Any]] = [{"program": each} for each in ("0-19 (20-29)", "0-15 18-29", "0-x", 7)]
    wrong += [{"prompt_logprobs": 1}, {}, {"program": DEEP}]
    rounds = [{"requests": [{**fine, **each}]} for each in wrong]
    found = bench.ask(rounds, max_model_len=512)["rounds"]
    named = ["20 to 29", "0 to 29", "0-x", "7", "prompt_logprobs"]
    assert [part in one["refused"] for part, one in zip(named, found, strict=False)] == [True] * len(named)
    assert all(len(one["answers"][0]["ids"]) == 2 for one in found[len(named) :])


def test_prompts_at_full_depth_are_scored_beside_filled_ones_as_alone(bench: Bench) -> None:
    ids = bench.model.encode("The sea was calm that day. " * 9)
    scored, filled = {"ids": ids, "tokens": 1, "prompt_logprobs": 0}, {"ids": ids[1:], "tokens": 1, "program": LIGHT}
    options: dict[str, Any] = {"enable_prefix_caching": False, "max_model_len": 512}
    alone, beside = bench.ask([{"requests": [scored]}, {"requests": [scored, filled]}], **options)["rounds"]
    scores = alone["answers"][0]["scores"]
    assert len(scores) == len(ids) - 1
    assert beside["answers"][0]["scores"] == pytest.approx(scores, abs=1e-4)


def test_a_server_that_cannot_run_programs_does_not_start(bench: Bench, tmp_path: Path) -> None:
    once = [{"requests": [{"ids": [5, 6, 7], "tokens": 1}]}]
    with pytest.raises(SystemExit, match="--enable-lora"):
        bench.ask(once, enable_lora=True)
    fills, bench.folder = (
        some_fill(bench.model, tmp_path / "fills"),
        bench.model.export("0-15 18-29", tmp_path / "shorter"),
    )
    with pytest.raises(SystemExit, match="fitted on"):
        bench.ask(once, fills)
