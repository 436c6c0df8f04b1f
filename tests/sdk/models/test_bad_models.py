"""Models that cannot be run and prompts that do not fit: a clear error before work starts, and the engine goes on."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from polar_sdk import ListSink, PolarModel
from polar_sdk.errors import CacheMemoryError, DeviceError, ModelDamagedError
from polar_sdk.models.load import clear_cache
from polar_sdk.testing import tiny_llama, tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


def spoilt(value: float) -> PreTrainedModel:
    """A model with one bad number."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[4].mlp.up_proj.weight[7, 3] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_folder_with_a_weight_that_is_no_number(tmp_path: Path, value: float, precision: str) -> None:
    spoilt(value).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    options: dict[str, Any] = {"device": "cpu", "precision": precision, "ledger": None}
    with pytest.raises(
        ModelDamagedError, match=r"weight model\.layers\.4\.mlp\.up_proj\.weight is not finite"
    ) as caught:
        PolarModel.from_pretrained(tmp_path, **options)
    assert str(tmp_path) in str(caught.value)
    tiny_llama().save_pretrained(tmp_path)  # once repaired, it loads in the same process
    assert PolarModel.from_pretrained(tmp_path, **options).generate("hello", max_tokens=2).usage.tokens.output == 2
    clear_cache()


def test_an_adopted_model_with_a_weight_that_is_no_number() -> None:
    with pytest.raises(ModelDamagedError, match=r"model 'llama' is damaged: weight model\.layers\.4\.mlp"):
        PolarModel.from_hf(spoilt(float("nan")), tiny_tokenizer(), ledger=None)


def test_a_model_that_is_not_in_memory() -> None:
    model: Any = tiny_llama()
    with pytest.raises(DeviceError, match="layer 0 of model 'llama' is on meta; the engine runs a layer on one"):
        PolarModel.from_hf(model.to("meta"), tiny_tokenizer(), ledger=None)


def test_a_prompt_that_the_memory_does_not_hold() -> None:
    sink = ListSink()
    page = 2 * 2 * 64 * 12 * 4  # keys and values, heads, tokens, size of a head, bytes
    model = tiny_model(sink=sink, kv_memory=12 * page)  # two pages for each of six layers
    expected = tiny_model().generate("hello", max_tokens=9).token_ids
    with pytest.raises(
        CacheMemoryError, match=r"prompt and answer of 30\d tokens need .* MiB of keys .*larger kv_memory"
    ):
        model.generate("x" * 290, max_tokens=10)
    (record,) = sink.records
    assert (record.outcome, record.error, record.flops.total) == ("error", "CacheMemoryError", 0)
    assert model.generate("hello", max_tokens=9).token_ids == expected


@pytest.mark.parametrize("precision", ["int5", "fp8", ""])
def test_a_precision_that_there_is_not(tmp_path: Path, precision: str) -> None:
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(DeviceError, match=f"precision '{precision}' is unknown; choose from: auto, bf16"):
        PolarModel.from_pretrained(tmp_path, precision=precision, ledger=None)


_LEAVES = """
import threading
from polar_sdk.testing import tiny_model

model, begun = tiny_model(), threading.Event()

def hook(tokens, logits):
    begun.set()
    return logits

options = dict(max_tokens=500, program="0-5", logits_hook=hook)
threading.Thread(target=model.generate, args=("hello",), kwargs=options, daemon=True).start()
begun.wait()
"""


def test_a_process_that_ends_in_mid_answer_ends_well() -> None:
    """Its engine is computing then; an interpreter that ends stops threads where they stand, and torch aborts."""
    run = subprocess.run([sys.executable, "-c", _LEAVES], capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stderr) == (0, "")
