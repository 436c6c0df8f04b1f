"""The comparison of methods, whole, on a tiny model: what its rows rest on is checked by other means."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.early_exit import EarlyExit
from benchmarks.methods import FULL, measure, own_keys_values, record
from benchmarks.results import Recorder
from benchmarks.shorter_prompts import shortened
from polar_sdk import PolarModel
from polar_sdk.models.load import clear_cache
from polar_sdk.testing import tiny_llama, tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of 12 layers, as `save_pretrained` writes it."""
    path = tmp_path_factory.mktemp("tiny") / "tiny"
    tiny_llama(layers=12, max_position_embeddings=8192).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def model(folder: Path) -> PolarModel:
    clear_cache()
    return PolarModel.from_pretrained(folder, precision="fp32", ledger=None)


def test_every_row_is_measured_and_recorded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POLAR_DATA", raising=False)
    clear_cache()
    options = Namespace(model=str(folder), smaller=str(folder), prompts=8, folder=tmp_path)
    rows = list[dict[str, Any]]()
    for system in ("base", "int4", "smaller", "exit"):
        measure(system, options)
        rows += [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    recorder = Recorder("methods", tmp_path)
    for row in rows:
        record(recorder, row, rows[0])
    figures = {one.name: one for one in recorder.figures}
    assert rows[0]["row"] == FULL
    assert figures[f"{FULL}: tokens kept"].value == figures[f"{FULL}: likeness"].value == 100
    assert figures["prompt-lookup drafts: right"].value == figures[f"{FULL}: right"].value
    assert {"prompt-lookup drafts: likeness", "prompt-lookup drafts: decode"} <= figures.keys()
    for name in ("1 layers left out", "2 layers left out", "PoLar's fills from layer 6"):
        assert figures[f"{name}: FLOPs saved"].value > 5, name
    assert figures["the article's policy router: training"].value > 0
    assert "promise: none" in (figures["the article's policy router: FLOPs saved"].note or "")
    assert {"early exit after 8 layers: decode", "int4: tokens kept"} <= figures.keys()
    assert all(0 <= one.value <= 100 for one in recorder.figures if one.name.endswith("tokens kept"))


def test_untrained_keys_and_values_are_those_of_the_layers(model: PolarModel) -> None:
    fill = own_keys_values(model, (7, 9))
    states = torch.randn(5, 48, generator=torch.Generator().manual_seed(1)) * 3
    with torch.inference_mode():
        written = fill(states, None)
        for index, layer in enumerate(range(7, 10)):
            own = torch.stack(model.decoder.keys_values(layer, states), 1)
            assert torch.allclose(written[:, index], own, atol=1e-4)


def test_early_exit_stops_where_it_is_sure_and_nowhere_else(folder: Path, model: PolarModel) -> None:
    peer, prompt = EarlyExit(folder, 8), list(range(40, 70))
    plain = peer.answer(prompt, 12, 2.0)
    assert plain.exits == 0
    written = model.generate(prompt, max_tokens=12, compute="exact").token_ids  # it ends where the model says so
    assert plain.chosen[: len(written)] == written
    assert peer.answer(prompt, 12, 2.0, plain.chosen).chosen == plain.chosen
    always = peer.answer(prompt, 12, 0.0)
    assert always.exits == 11
    assert always.chosen != plain.chosen


def test_a_shorter_prompt_keeps_the_question_and_the_order() -> None:
    sentences = [f"Sentence number {number} is about the harbour and its {number} boats." for number in range(8)]
    prompt = f"What is said about boats?\n\n{' '.join(sentences)}\n\nAnswer briefly."
    seen = list[Any]()

    def last_and_first(texts: Any, rest: str, count: int) -> set[int]:
        seen.append((list(texts), rest, count))
        return {7, 0, 3, 5}

    short = shortened(prompt, 0.5, last_and_first)
    assert seen == [(sentences, "What is said about boats? Answer briefly.", 4)]
    kept = " ".join(sentences[place] for place in (0, 3, 5, 7))
    assert short == f"What is said about boats?\n\n{kept}\n\nAnswer briefly."
    assert shortened("Short.\n\nVery short.", 0.5, last_and_first) == "Short.\n\nVery short."
