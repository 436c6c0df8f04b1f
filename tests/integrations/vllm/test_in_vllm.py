"""Programs inside a real vLLM, on the CPU, in the environment that `make vllm-env` makes."""

from __future__ import annotations

import json
import urllib.request
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from benchmarks.servers import Running
from benchmarks.vllm import DEEP, LIGHT, STOCK, Bench, answers, closes, some_fill
from polar_billing.cli.upstream import audit_upstream
from polar_billing.ledger.ledger import Ledger
from polar_billing.ledger.records import ALL_TENANTS, Selection
from polar_sdk import PolarModel, Program
from polar_sdk.programs.policy import Policy
from polar_sdk.testing import tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polar_sdk import UsageRecord

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


# -- tiny models of random weights -------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 2048, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": 256, "pad_token_id": None, "sliding_window": None,
}  # fmt: skip
FILLING = "0-2 (3-5:4)"


def tiny(folder: Path, name: str, **changed: Any) -> Bench:
    """A model of an architecture, and a map for its last three layers."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**TINY | changed)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    model = PolarModel.from_pretrained(folder / "tiny", precision="fp32", ledger=None)
    return Bench(ENV, folder, folder / "tiny", some_fill(model, folder / "fills", (3, 5), 0.3))


PROMPTS = [
    f"Of {number} ships the sea was calm that day, and so were they. "[: 30 + 7 * number] * 3 for number in range(8)
]


def requests(bench: Bench, programs: tuple[str | None, ...], tokens: int = 12) -> list[dict[str, Any]]:
    ids = [bench.model.request(text).tokens for text in PROMPTS]
    return [{"ids": each, "tokens": tokens, "program": program} for each, program in zip(ids, cycle(programs))]


@pytest.mark.parametrize("name", ["Qwen3", "Mistral"])
def test_further_families_run_as_in_vllm_and_as_in_our_engine(tmp_path: Path, name: str) -> None:
    bench = tiny(tmp_path, name)
    options: dict[str, Any] = {"enable_prefix_caching": False, "max_num_batched_tokens": 96, "max_model_len": 512}
    found = answers(bench.ask([{"requests": requests(bench, (None, FILLING))}], **options))
    stock = answers(bench.ask([{"requests": requests(bench, (None,))}], STOCK, **options))
    assert found[::2] == stock[::2]
    assert found[1::2] != stock[1::2]  # or the fill would change nothing
    for program, own in (("0-5", found[::2]), (FILLING, found[1::2])):
        texts = PROMPTS[program == FILLING :: 2]
        ours = bench.model.generate_batch(texts, program=program, max_tokens=12, ignore_eos=True)
        assert [list(one.token_ids) for one in ours] == own


def test_a_model_with_a_sliding_window_is_refused(tmp_path: Path) -> None:
    bench = tiny(tmp_path, "Mistral", sliding_window=32)
    with pytest.raises(SystemExit, match="sliding window"):
        bench.ask([{"requests": requests(bench, (None,))}], max_model_len=512)


def test_drafts_change_no_token_and_those_that_are_not_taken_are_counted(tmp_path: Path) -> None:
    bench = tiny(tmp_path, "Llama")
    rounds = [{"requests": requests(bench, (None, FILLING), 30)} for _ in range(2)]
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    plain = bench.ask(rounds, max_model_len=512, enable_prefix_caching=False)
    drafted = bench.ask(rounds, max_model_len=512, enable_prefix_caching=False, speculative_config=drafts)
    assert answers(drafted) == answers(plain)
    first, second = drafted["rounds"]
    before, after = first["counted"][0], second["counted"][0]
    assert after["rejected"] > before["rejected"] > 0
    assert closes(rounds[1], second, before, after, "0-5")


def test_a_stream_that_is_cut_is_billed_as_sent_and_the_audit_closes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bench, ledger = tiny(tmp_path, "Llama"), str(tmp_path / "ledger.sqlite3")
    tiers = {"economy": {"program": FILLING}, "exact": {"program": "0-5"}}
    policy = Policy.model_validate({"protected": [], "default_tier": "exact", "tiers": tiers})
    model = PolarModel(bench.model.loaded, policy=policy, ledger=ledger)

    def asked(tier: str, prompt: str, tokens: int) -> dict[str, Any]:
        fields = {"temperature": 0, "ignore_eos": True, "max_tokens": tokens}
        return {"model": f"bench:{tier}", "messages": [{"role": "user", "content": prompt}], **fields}

    def texts(front: Running) -> list[str]:
        return [front.text(asked(tier, prompt, 24)) for prompt, tier in zip(PROMPTS, cycle(tiers))]

    with bench.served() as url:
        front = Running(model, backends={tier: [f"programs+{url}"] for tier in tiers})
        try:
            cold = texts(front)
            for number, (prompt, tier) in enumerate(zip(PROMPTS, cycle(tiers))):
                read_and_leave(front.port, asked(tier, prompt, 1000), 2 + 3 * number)
            assert texts(front) == cold
        finally:
            front.close()
        with Ledger(ledger) as store:
            records = [each.record for each in store.read(Selection(ALL_TENANTS))]
        check_cut(bench, [record for record in records if record.outcome == "cancelled"])
        assert len(records) == 3 * len(PROMPTS)
        audit_upstream([url], ledger=ledger, as_json=True)
    said = capfd.readouterr().out
    (audit,) = json.loads(said[said.index("{") :])["audits"]
    assert audit["requests"] == len(records)
    assert audit["closes"]


def read_and_leave(port: int, body: dict[str, Any], events: int) -> None:
    """Read so many events of a stream, and close the connection."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps({**body, "stream": True}).encode()
    )
    request.add_header("content-type", "application/json")
    with urllib.request.urlopen(request, timeout=300) as answer:
        while events and (line := answer.readline()):
            events -= line.startswith(b"data:")
    assert events == 0


def check_cut(bench: Bench, records: list[UsageRecord]) -> None:
    assert len(records) == len(PROMPTS)
    for record in records:
        tokens, cost = record.tokens, bench.model.decoder.cost
        assert 0 < tokens.output < 1000
        formula = cost.request(Program.parse(record.program), tokens.input, tokens.output, cached=tokens.cached)
        assert record.flops.total == formula.total
