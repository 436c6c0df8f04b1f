"""The main job on the real default model: prompt → router → program → execution → record → ledger → price → report."""

from __future__ import annotations

import json
from collections import Counter
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from polar_sdk import PolarModel, Program
from polar_sdk.engine.forward import next_logits
from polar_sdk.engine.row import Row
from tests.sdk.command import polar

if TYPE_CHECKING:
    from torch import Tensor

    from polar_sdk.engine.types import Visits, Weights


pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def exact() -> PolarModel:
    return PolarModel.from_pretrained(precision="fp32", ledger=None)  # torch counts no native FLOPs


def test_a_loop_decodes_the_same_tokens_with_and_without_the_cache(exact: PolarModel) -> None:
    program = Program.parse("0-14 15x2 16-29")
    done = exact.generate("Name three colours.", program=program, max_tokens=12)
    decoder, prompt = exact.loaded.decoder, exact._encoder.encode("Name three colours.")
    tokens: list[int] = []
    while len(tokens) < len(done.token_ids):
        with torch.inference_mode():
            logits = next_logits(decoder, [Row(decoder, program)], [[*prompt, *tokens]])
        tokens.append(int(logits[0].argmax()))
    assert tuple(tokens) == done.token_ids


def test_metered_flops_are_torchs_own(exact: PolarModel) -> None:
    decoder = exact.loaded.decoder
    row = Row(decoder, Program.parse("0-14 15x2 16-29"))
    before = 0
    for tokens in (exact.encode("The quick brown fox jumps over the lazy dog."), [28]):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            next_logits(decoder, [row], [tokens])
        assert row.work.flops().total - before == counter.get_total_flops() > 0
        before = row.work.flops().total


def test_identity_is_hugging_faces_generate(exact: PolarModel) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    (gguf,) = exact.loaded.weights
    numbers = GgufConfig(dequantize=True)
    reference: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=numbers
    )
    ids = torch.tensor([exact._encoder.encode("Write one sentence about the sea.")])
    out = reference.generate(ids, max_new_tokens=24, do_sample=False)
    ours = exact.generate("Write one sentence about the sea.", compute="exact", max_tokens=24)
    assert ours.token_ids == tuple(out[0, ids.shape[1] :].tolist())


def test_from_prompt_to_bill(ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tenants on all tiers, one stream broken off; the ledger holds what ran, the bill adds up."""
    model = PolarModel.from_pretrained(ledger=ledger_url)
    decoder = model.loaded.decoder
    calls: Counter[int] = Counter()
    run = decoder.finish

    def counting(index: int, x: Tensor, mixed: Tensor) -> Tensor:
        out = run(index, x, mixed)
        calls[index] += 1
        return out

    monkeypatch.setattr(decoder, "finish", counting)
    if decoder.kernels.decodes:  # then it runs a layer, or all of them, as one call
        layer_of = {id(weights): index for index, weights in enumerate(decoder.layers)}
        decode = decoder.kernels.decode

        def counting_decode(w: Weights, *arguments: Any) -> Tensor:
            calls[layer_of[id(w)]] += 1
            return decode(w, *arguments)

        decode_layers = decoder.kernels.decode_layers

        def counting_decode_layers(x: Tensor, visits: Visits, *arguments: Any) -> Tensor:
            calls.update(visits.layers.tolist())
            return decode_layers(x, visits, *arguments)

        monkeypatch.setattr(decoder.kernels, "decode", counting_decode)
        monkeypatch.setattr(decoder.kernels, "decode_layers", counting_decode_layers)
    costs: dict[str, Decimal] = {"acme": Decimal(0), "globex": Decimal(0)}
    for tenant in costs:
        for tier in ("economy", "standard", "premium", "exact"):
            done = model.generate("What is two and two?", compute=tier, tenant=tenant, max_tokens=6)
            assert done.receipt is not None
            costs[tenant] += Decimal(done.receipt["cost"])
    stream = model.stream("Tell me a story.", tenant="acme", compute="premium")
    for _ in range(3):
        next(stream)
    stream.close()

    usage = json.loads(polar("usage", "--requests", "--json").stdout)
    assert len(usage) == 9
    report = json.loads(polar("report", "--json").stdout)
    depth = [panel for tier in report["tiers"] for panel in tier["depth"]]
    layers = [sum(p["visits_prefill"][i] + p["visits_decode"][i] for p in depth) for i in range(model.depth)]
    assert layers == [calls[layer] for layer in range(model.depth)]
    for tenant in report["tenants"]:
        lines = sum(Decimal(line["amount"]) for line in tenant["lines"])
        assert lines + Decimal(tenant["rounding"]) == Decimal(tenant["total"])
    assert sum(Decimal(tenant["total"]) for tenant in report["tenants"]) == Decimal(report["total"]) > 0
    exact = sum(costs.values()) + sum(Decimal(row["cost"]) for row in usage if row["outcome"] == "cancelled")
    assert abs(exact - Decimal(report["total"])) <= Decimal(len(report["tenants"])) * Decimal(10) ** -report["decimals"]
