"""Metered is what was executed: FLOPs to the FLOP, visits to the visit, however the request ends."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from polar_sdk import ListSink, Policy, Program
from polar_sdk.engine.decoder import build_decoder
from polar_sdk.engine.forward import next_logits
from polar_sdk.engine.kernels import TorchKernels
from polar_sdk.engine.layout import schedule
from polar_sdk.engine.row import Row
from polar_sdk.testing import tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from polar_sdk.engine.decoder import Decoder
    from polar_sdk.engine.types import Projected, Rotary, Weights
    from polar_sdk.model import PolarModel

    TinyFamily = Callable[..., PreTrainedModel]

DEPTH = 6
PROGRAMS = ["0-5", "0-1 3-5", "0-2 3x2 4-5", "0 2x3 1 5", "5"]


@pytest.mark.parametrize(("text", "prompt"), [*((text, 33) for text in PROGRAMS), ("0 2x3 1 5", 1)])
def test_flops_of_a_prefill_and_of_each_decode_step_are_torchs_own(
    family: str, text: str, prompt: int, tiny_family: TinyFamily
) -> None:
    decoder = build_decoder(tiny_family(family))
    row = Row(decoder, Program.parse(text))
    before = 0
    for tokens in ([7] * prompt, [8], [9]):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            next_logits(decoder, [row], [tokens])
        metered = row.work.flops().total
        assert metered - before == counter.get_total_flops()
        before = metered


def test_the_reference_model_counts_the_same_flops(variant: str, tiny_family: TinyFamily) -> None:
    """The cost model against FlopCounterMode on the untouched Hugging Face model, layer by layer."""
    model = tiny_family(variant)
    cost = build_decoder(model).cost
    with torch.inference_mode(), FlopCounterMode(display=False, depth=10) as counter:
        model(torch.tensor([[5] * 21]), use_cache=False, logits_to_keep=1)
    assert sum(layer.flops(21, 21) for layer in cost.layers) + cost.head == counter.get_total_flops()
    counted = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    layers = [counted[name] for name in sorted(counted) if name.rpartition(".")[0].endswith(("layers", ".h"))]
    assert layers == [layer.flops(21, 21) for layer in cost.layers]


def test_flops_of_a_ragged_batch_are_torchs_own_without_padding(family: str, tiny_family: TinyFamily) -> None:
    """Rows that decode attend together, over as many keys as the longest has; those beyond its own are no row's."""
    decoder = build_decoder(tiny_family(family))
    programs = [Program.parse(text) for text in PROGRAMS]
    rows = [Row(decoder, program) for program in programs]
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        next_logits(decoder, rows, [[3] * (5 + 4 * number) for number in range(len(rows))])
        assert sum(row.work.flops().total for row in rows) == counter.get_total_flops()
        next_logits(decoder, rows, [[4]] * len(rows))
    padding = 0
    for turn in schedule(tuple(programs)):
        lengths = [rows[row].length for row, _ in turn.members]
        attention = decoder.cost.layers[turn.step.first].attention
        padding += sum((max(lengths) - length) * attention for length in lengths)
    assert padding > 0
    assert sum(row.work.flops().total for row in rows) + padding == counter.get_total_flops()


class Hooked(TorchKernels):
    """Counts finished layers from outside the meter; breaks down when `stop_at` are finished."""

    def __init__(self, decoder: Decoder, stop_at: int | None = None) -> None:
        super().__init__(decoder.family)
        self._numbers = {id(weights): number for number, weights in enumerate(decoder.layers)}
        self.calls: Counter[int] = Counter()
        self.stop_at = stop_at
        decoder.kernels = self

    def project(self, w: Weights, x: Tensor, rotary: Rotary) -> Projected:
        if self.calls.total() == self.stop_at:
            raise RuntimeError("the device fell over")
        return super().project(w, x, rotary)

    def finish(self, w: Weights, x: Tensor, mixed: Tensor) -> Tensor:
        out = super().finish(w, x, mixed)
        self.calls[self._numbers[id(w)]] += 1
        return out

    def by_layer(self) -> list[int]:
        return [self.calls[number] for number in range(DEPTH)]


def model_with_sink() -> tuple[PolarModel, ListSink]:
    sink = ListSink()
    return tiny_model(sink=sink, policy=Policy.permissive()), sink


@pytest.mark.parametrize("text", PROGRAMS)
def test_metered_visits_are_those_that_hooks_count(text: str) -> None:
    model, sink = model_with_sink()
    hooked = Hooked(model.loaded.decoder)
    model.generate("count me", program=text, max_tokens=9)
    visits = sink.records[0].visits
    assert [a + b for a, b in zip(visits.prefill, visits.decode, strict=True)] == hooked.by_layer()


def test_a_closed_stream_is_counted_up_to_its_last_computed_token() -> None:
    model, sink = model_with_sink()
    hooked = Hooked(model.loaded.decoder)
    stream = model.stream("break me off", program="0-2 3x2 4-5", max_tokens=40)
    for _ in range(4):
        next(stream)
    stream.close()
    (record,) = sink.records
    assert (record.outcome, record.finish_reason) == ("cancelled", "cancelled")
    assert 4 <= record.tokens.output <= 8  # what was handed out, and the few tokens that are computed ahead
    assert record.visits.total == hooked.calls.total()
    assert record.flops == model.cost("0-2 3x2 4-5", prompt=record.tokens.input, output=record.tokens.output)


@pytest.mark.parametrize("stop_at", [3, 8, 15])
def test_a_failure_in_mid_layer_is_counted_up_to_the_last_finished_layer(stop_at: int) -> None:
    model, sink = model_with_sink()
    hooked = Hooked(model.loaded.decoder, stop_at)
    with pytest.raises(RuntimeError, match="fell over"):
        model.generate("hello", program="0-5", max_tokens=9)
    (record,) = sink.records
    assert (record.outcome, record.finish_reason, record.error) == ("error", "error", "RuntimeError")
    assert record.visits.total == stop_at == hooked.calls.total()
    assert 0 < record.flops.total <= record.identity_flops + record.flops.layers_decode


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit(143)])
def test_the_end_of_the_process_is_recorded_as_cancelled(
    stop: BaseException | type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sink = model_with_sink()

    def interrupt(*_: object) -> Tensor:
        raise stop

    monkeypatch.setattr(model.loaded.decoder, "head", interrupt)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        model.generate("hello", max_tokens=5)
    assert [record.outcome for record in sink.records] == ["cancelled"]
    assert sink.records[0].flops.head == 0 < sink.records[0].flops.layers_prefill


def test_every_row_of_a_failing_batch_gets_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sink = model_with_sink()

    def fail(*_: object) -> Tensor:
        raise RuntimeError("no")

    monkeypatch.setattr(model.loaded.decoder, "head", fail)
    with pytest.raises(RuntimeError):
        model.generate_batch(["a", "b", "c"], each=[{"request_id": n} for n in "123"])
    assert [(record.request_id, record.outcome) for record in sink.records] == [(n, "error") for n in "123"]
