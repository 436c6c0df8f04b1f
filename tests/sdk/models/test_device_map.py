"""Layers on several devices: what a map means, what it refuses, and that answers, bills and pages stay as they are.

torch computes the same on `cpu` and `cpu:0` and tells them apart by name, so a model split over the two must answer
exactly as one in one piece. What lies on `meta` mixes with nothing, so a pass over both leaves nothing behind.
"""

from __future__ import annotations

import copy
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from polar_sdk import PolarModel, Policy, Program
from polar_sdk.engine.decoder import build_decoder
from polar_sdk.engine.families import find_family
from polar_sdk.engine.forward import next_logits
from polar_sdk.engine.maps import Bridge
from polar_sdk.engine.pack import Question
from polar_sdk.engine.placement import Placement
from polar_sdk.engine.row import Row
from polar_sdk.engine.scoring import score_questions, states_after
from polar_sdk.errors import CacheMemoryError, DeviceError
from polar_sdk.lab.healing.packs import own_copy
from polar_sdk.models.load import clear_cache
from polar_sdk.models.placement import place, read_map
from polar_sdk.testing import tiny_llama, tiny_tokenizer
from polar_sdk.usage import ListSink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

    from polar_sdk.engine.decoder import Decoder

CPU, OTHER, META = torch.device("cpu"), torch.device("cpu:0"), torch.device("meta")
CUDA, CUDA1 = torch.device("cuda:0"), torch.device("cuda:1")
SPLIT = Placement(CPU, (CPU, CPU, OTHER, OTHER, OTHER, CPU), OTHER)
PROGRAMS = ["0-5", "0-1 4-5", "0 1x3 2 4x2 5", "5 0-2", "2-4"]
MIXED = ("mixtral", "qwen2_moe")
"""Families that look at values, which `meta` has none of."""


@pytest.fixture
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device that torch has a name for is here, with 8 GiB free, and `cpu:0` is another one than `cpu`."""
    monkeypatch.setattr("polar_sdk.models.placement.choose_device", torch.device)
    monkeypatch.setattr("polar_sdk.engine.decoder.free_memory", lambda device: 8 << 30)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    yield tmp_path
    clear_cache()


def planned(device_map: Any, model: PreTrainedModel | None = None) -> Placement:
    network = model or tiny_llama()
    return place(read_map(device_map), network, find_family(network.config), "fp32", torch.float32)


@pytest.mark.usefixtures("any_device")
class TestMaps:
    def test_by_range(self) -> None:
        expected = Placement(CUDA, (CUDA,) * 3 + (CUDA1,) * 3, CUDA1)
        assert planned({"0-2": "cuda:0", "3-5": "cuda:1"}) == expected
        assert planned({"3-5": 1, "0": 0, "1-2": "cuda:0"}) == expected
        assert planned("0-2=cuda:0, 3-5=cuda:1") == expected
        assert planned("0-2=0,3-5=1") == expected
        assert str(expected) == "cuda:0+cuda:1"

    def test_by_module(self) -> None:
        layers = {f"model.layers.{index}": 0 if index < 4 else "cpu" for index in range(6)}
        found = planned({"model.embed_tokens": 0, **layers, "model.norm": "cpu", "lm_head": 1, "model.rotary_emb": 0})
        assert found == Placement(CUDA, (CUDA,) * 4 + (CPU,) * 2, CUDA1)
        assert planned({"": "cuda:1"}).devices == (CUDA1,)
        assert planned({"model": "cuda:0", "model.layers.5": "cpu", "lm_head": "cpu"}).layers[4:] == (CUDA, CPU)

    def test_parts_of_a_layer_may_be_named_if_they_stay_together(self) -> None:
        parts = {"": 0, "model.layers.2.mlp": 1}
        with pytest.raises(DeviceError, match=r"splits layer 'model.layers.2' over cuda:0 and cuda:1; assign one"):
            planned(parts)
        whole = {"": 1, "model.layers.2.mlp": 1}
        assert planned(whole).devices == (CUDA1,)

    def test_the_head_of_tied_weights_follows_the_last_layer(self, tiny_family: Callable[..., PreTrainedModel]) -> None:
        device_map = {"model.embed_tokens": 0, "model.layers": 1, "model.norm": 1}
        assert planned(device_map, tiny_family("llama, tied embeddings")).last == CUDA1
        with pytest.raises(DeviceError, match="no device for 'lm_head'; add it"):
            planned(device_map, tiny_family("llama"))

    @pytest.mark.parametrize(
        ("device_map", "says"),
        [
            ({"0-9": "cpu"}, r"places layers 0-9; the model has 6 layers, 0 to 5"),
            ({"2-1": "cpu"}, r"places layers 2-1; the model has 6 layers"),
            ({"0-3": "cpu", "3-5": 0}, r"places layer 3 twice"),
            ({"0-1": "cpu", "4-5": 0}, r"no device for layers 2, 3 of 6 layers"),
            ({"model.layers.6": 0, "": 0}, r"names 'model\.layers\.6', which .* did you mean 'model\.layers\.\d'\?"),
            ({"model.layers": 0, "lm_head": 0}, r"no device for 'model\.embed_tokens'; add it"),
            ({"model.embed_tokens": 0, "lm_head": 0, "model.layers.0": 0}, r"no device for 'model\.layers\.1\."),
            ({"": "disk"}, r"gives '' the device 'disk'; weights must be in memory"),
            ({}, r"device_map=\{\} is not a map; use 'auto', or for example"),
            (7, r"device_map=7 is not a map"),
            ("0-5", r"gives '0-5' the device ''"),
        ],
    )
    def test_maps_that_are_refused(self, device_map: Any, says: str) -> None:
        with pytest.raises(DeviceError, match=says):
            planned(device_map)

    def test_a_map_that_does_not_fit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("polar_sdk.engine.decoder.free_memory", lambda device: 40_000)
        with pytest.raises(
            DeviceError, match=r"layers 0, 1, 2, 3, 4 need 0\.00 GiB on cuda:0, where 0\.00 GiB are free\. Assign"
        ):
            planned({"0-4": 0, "5": 1})

    def test_auto_spreads_whole_layers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_llama()
        layer = 4 * sum(weight.numel() for weight in model.model.layers[0].parameters())
        free = {0: 8 * layer, 1: 8 * layer, "cpu": 100 * layer}
        monkeypatch.setattr("accelerate.utils.get_max_memory", lambda *_: dict(free))
        monkeypatch.setattr("accelerate.utils.modeling.get_max_memory", lambda given=None: given or dict(free))
        found = planned("auto", model)
        assert set(found.devices) <= {CUDA, CUDA1, CPU}
        assert len(found.devices) > 1
        assert list(found.layers) == sorted(found.layers, key=found.stores.index)  # in one piece per device
        free.update({0: layer, 1: layer, "cpu": 2 * layer})
        with pytest.raises(DeviceError, match=r"the model needs 0\.0 GiB in fp32; 0\.0 GiB on 0, .* on cpu are free"):
            planned("auto", model)


def test_auto_on_this_machine(folder: Path) -> None:
    model = PolarModel.from_pretrained(folder, device_map="auto", precision="fp32", ledger=None)
    assert model.device == str(torch.get_default_device()) or torch.accelerator.is_available()
    assert model.generate("hello", max_tokens=3).token_ids == _whole(folder).generate("hello", max_tokens=3).token_ids


def test_a_device_that_is_not_here(folder: Path) -> None:
    with pytest.raises(DeviceError, match="device 'cuda:77' is not available here"):
        PolarModel.from_pretrained(folder, device_map={"0-5": "cuda:77"}, ledger=None)
    with pytest.raises(DeviceError, match="device='cpu' and device_map='auto' exclude each other"):
        PolarModel.from_pretrained(folder, device="cpu", device_map="auto", ledger=None)


def test_split_models_compute_the_same(family: str, tiny_family: Callable[..., PreTrainedModel]) -> None:
    model = tiny_family(family)
    split, whole = build_decoder(model, placement=SPLIT), build_decoder(model)
    rng = random.Random(3)
    starts = [[rng.randrange(256) for _ in range(3 + 40 * number)] for number in range(len(PROGRAMS))]
    for ours, theirs in zip(_passes(split, starts), _passes(whole, starts), strict=True):
        assert torch.equal(ours, theirs)
    question = Question(tuple(starts[4]), ((1, 2, 3), (4,)))
    for text in PROGRAMS:
        found, expected = (score_questions(one, [question], Program.parse(text)) for one in (split, whole))
        assert found == expected
    assert split.pool.free == split.pool.size


def _passes(decoder: Decoder, starts: list[list[int]]) -> list[torch.Tensor]:
    """Logits of a prefill, of a second chunk and of a decode step, of rows with different programs together."""
    rows = [Row(decoder, Program.parse(text)) for text in PROGRAMS]
    found = [next_logits(decoder, rows, starts)]
    found.append(next_logits(decoder, rows, [[5, 6, 7]] * len(rows)))
    found.append(next_logits(decoder, rows, [[9]] * len(rows)))
    for row in rows:
        row.page_table.release()
    return found


def test_nothing_is_left_behind(family: str, tiny_family: Callable[..., PreTrainedModel]) -> None:
    if family in MIXED:
        pytest.skip("a mixture of experts looks at values")
    model = copy.deepcopy(tiny_family(family))
    for layer in find_family(model.config).layer_modules(model)[3:]:
        layer.to("meta")
    placement = Placement(CPU, (CPU,) * 3 + (META,) * 3, META)
    decoder = build_decoder(model, placement=placement, kv_memory=1 << 22)
    rows = [Row(decoder, Program.parse(text)) for text in ("0-5", "0 2-5")]
    for tokens in ([[1, 2, 3], [4] * 140], [[5], [6]]):
        logits = next_logits(decoder, rows, tokens)
        assert (logits.device, logits.shape) == (META, (2, decoder.vocab))
    (states,) = states_after(decoder, [(1,) * 150], Program.identity(6).steps)
    assert states.device == META


@pytest.mark.usefixtures("any_device")
class TestServing:
    def test_answers_and_bills_are_those_of_one_device(self, folder: Path) -> None:
        sink = ListSink()
        split = _split(folder, sink=sink)
        assert split.device == "cpu+cpu:0"
        asked = [(text, 7 + 30 * number) for number, text in enumerate(PROGRAMS)]
        each: list[Any] = [{"program": text} for text, _ in asked]
        prompts = ["x" * size for _, size in asked]
        found = split.generate_batch(prompts, each=each, max_tokens=6)
        expected = _whole(folder).generate_batch(prompts, each=each, max_tokens=6)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.token_ids == theirs.token_ids
            assert (ours.usage.flops, ours.usage.visits) == (theirs.usage.flops, theirs.usage.visits)
            assert ours.usage.kv_bytes_peak == theirs.usage.kv_bytes_peak
        assert {record.device for record in sink.records} == {"cpu+cpu:0"}

    def test_starts_of_prompts_are_shared_and_pages_come_back(self, folder: Path) -> None:
        model = _split(folder)
        first = model.generate("y" * 200, max_tokens=4, program="0-5")
        again = model.generate("y" * 200, max_tokens=4, program="0-5")
        assert again.token_ids == first.token_ids
        assert again.usage.tokens.cached == 192
        pool = model.loaded.decoder.pool
        assert len(pool.sizes) == 2
        model.scheduler.prefixes.make_room(pool.sizes)
        assert pool.free == pool.size

    def test_sampling_and_loops_and_bridges(self, folder: Path) -> None:
        split, whole = _split(folder), _whole(folder)
        size = split.loaded.decoder.family.hidden
        maps = torch.Generator().manual_seed(1)
        weight = (0.01 * torch.randn(size, size, generator=maps),)
        bridge = Bridge(weight, 0.01 * torch.randn(size, generator=maps), torch.zeros(size))
        for model in (split, whole):
            model.loaded.decoder.set_bridges({(1, 3): bridge})
        split, whole = (PolarModel(one.loaded, policy=Policy.permissive(), ledger=None) for one in (split, whole))
        for options in ({"temperature": 0.9, "seed": 4}, {"program": "0 1x3 2-5"}, {"program": "0 [1-3] 4-5"}):
            found, expected = (model.generate("hello", max_tokens=8, **options) for model in (split, whole))
            assert found.token_ids == expected.token_ids
            assert found.usage.flops == expected.usage.flops
        assert len(split.hidden_states(["a b c"], layer=4)) == 1

    def test_memory_is_shared_out_by_layers(self, folder: Path) -> None:
        page = 2 * 2 * 64 * 12 * 4  # keys and values, heads, tokens, size of a head, bytes
        model = _split(folder, kv_memory=12 * page)
        assert model.loaded.decoder.pool.sizes == [4, 8]
        with pytest.raises(CacheMemoryError, match=r"prompt and answer of 30\d tokens need"):
            model.generate("x" * 290, max_tokens=10)
        assert model.generate("hello", max_tokens=9, program="0-5").token_ids
        clear_cache()
        with pytest.raises(CacheMemoryError, match=f"Give it at least {6 * page} bytes"):
            _split(folder, kv_memory=5 * page).generate("x", max_tokens=1)

    def test_what_needs_one_device_says_so(self, folder: Path) -> None:
        with pytest.raises(DeviceError, match=r"maps are fitted on one device, not on cpu\+cpu:0"):
            own_copy(_split(folder).loaded.decoder)


def test_a_model_that_its_owner_has_split() -> None:
    model = tiny_llama()
    model.model.layers[3].mlp.to("meta")
    with pytest.raises(DeviceError, match=r"layer 3 of model 'llama' is on cpu and meta; the engine runs a layer on"):
        PolarModel.from_hf(model, tiny_tokenizer(), ledger=None)


def _split(folder: Path, **options: Any) -> PolarModel:
    device_map = {"0-1": "cpu", "2-5": "cpu:0"}
    given = {"ledger": None, "precision": "fp32", "policy": Policy.permissive()} | options
    return PolarModel.from_pretrained(folder, device_map=device_map, **given)


def _whole(folder: Path) -> PolarModel:
    return PolarModel.from_pretrained(folder, device="cpu", precision="fp32", policy=Policy.permissive(), ledger=None)
