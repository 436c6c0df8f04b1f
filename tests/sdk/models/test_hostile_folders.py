"""Model folders of strangers: values that break or bloat transformers, and indexes that point elsewhere."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from polar_sdk import PolarModel
from polar_sdk.errors import ModelDamagedError, PolarError
from polar_sdk.models.load import clear_cache
from polar_sdk.models.store import check_folder
from polar_sdk.testing import tiny_llama, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def spoil(folder: Path) -> Any:
    """Load the folder with another configuration, which is put back afterwards."""
    file = folder / "config.json"
    valid = file.read_bytes()

    def load(**values: object) -> None:
        file.write_text(json.dumps({**json.loads(valid), **values}))
        start = time.process_time()
        try:
            PolarModel.from_pretrained(folder, ledger=None, device="cpu")
        finally:
            assert time.process_time() - start < 10

    yield load
    file.write_bytes(valid)
    clear_cache()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("num_attention_heads", 0, "num_attention_heads = 0; it must be a whole number from 1"),
        ("num_key_value_heads", 0, "num_key_value_heads = 0"),
        ("dtype", "evil", "dtype = 'evil'; it must be one of auto, float16"),
        ("torch_dtype", "__class__", "torch_dtype = '__class__'"),
        ("max_position_embeddings", 10**30, "max_position_embeddings = 1000"),
        ("num_hidden_layers", 10_000, "num_hidden_layers = 10000; it must be a whole number from 1 to 4,096"),
        ("num_hidden_layers", 4_000, "it has 4000 layers, but the weights are those of 6"),
        ("vocab_size", 10**12, "vocab_size = 1000000000000"),
        ("hidden_size", "48", "hidden_size = '48'"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps = nan; it must be finite"),
        (
            "rope_parameters",
            {"rope_type": "linear", "factor": float("inf")},
            "rope_parameters = inf; it must be finite",
        ),
    ],
)
def test_a_configuration_with_an_absurd_value_is_refused_by_name(
    spoil: Callable[..., None], name: str, value: object, told: str
) -> None:
    with pytest.raises(ModelDamagedError) as caught:
        spoil(**{name: value})
    assert "config.json" in str(caught.value)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"num_attention_heads": 7},
        {"num_key_value_heads": 3},
        {"rope_parameters": "evil"},
        {"rope_parameters": {"rope_type": "evil"}},
        {"hidden_act": "evil"},
        {"head_dim": 1_000_000},
        {"rms_norm_eps": "evil"},
        {"eos_token_id": {"a": []}},
        {"num_hidden_layers": None},
    ],
)
def test_a_configuration_that_transformers_cannot_use_is_a_polar_error(
    spoil: Callable[..., None], values: dict[str, object]
) -> None:
    with pytest.raises(PolarError):
        spoil(**values)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a":' * 100_000, b'{"max_new_tokens": ' + b"9" * 5_000 + b"}", b"[]", b"\xff"]
)
def test_generation_settings_that_are_not_readable_are_a_polar_error(
    folder: Path, spoil: Callable[..., None], content: bytes
) -> None:
    file = folder / "generation_config.json"
    valid = file.read_bytes()
    try:
        file.write_bytes(content)
        with pytest.raises(ModelDamagedError, match=r"generation|config"):
            spoil()
    finally:
        file.write_bytes(valid)


@pytest.mark.parametrize(
    "place",
    [
        *("/etc/passwd", "../out.safetensors", "a/../../out.safetensors", "..\\x.safetensors", "model.bin"),
        *(5, None, [1], {}, "x\0.safetensors", "", ".", "x" * 5_000 + ".safetensors"),
    ],
)
def test_an_index_that_points_out_of_its_folder_is_refused_before_anything_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: object
) -> None:
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    (folder / "model.safetensors").rename(tmp_path / "out.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": place}}))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a file was opened")

    monkeypatch.setattr("safetensors.safe_open", never)
    with pytest.raises(ModelDamagedError, match=r"a weight is not in a `\.safetensors` file of the folder itself"):
        check_folder(folder)


@pytest.mark.parametrize("ends", [{"a": 1}, "</s>", 1.5, True, [2, [3]], [{}]])
def test_end_tokens_that_are_no_ids_are_refused(folder: Path, spoil: Callable[..., None], ends: object) -> None:
    file = folder / "generation_config.json"
    valid = file.read_bytes()
    try:
        file.write_text(json.dumps({**json.loads(valid), "eos_token_id": ends}))
        with pytest.raises(ModelDamagedError, match="eos_token_id"):
            spoil()
    finally:
        file.write_bytes(valid)


@pytest.mark.parametrize("index", [[], {"weight_map": []}, {"weight_map": {}}, {"weight_map": 5}])
def test_an_index_of_another_form_is_refused(tmp_path: Path, index: object) -> None:
    tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelDamagedError):
        check_folder(tmp_path)


def test_a_folder_in_shards_still_loads(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    model = PolarModel.from_pretrained(tmp_path, ledger=None, device="cpu")
    with torch.inference_mode():
        assert model.generate("hello", max_tokens=1).token_ids
    clear_cache()


def test_a_tokenizer_whose_settings_cannot_be_used_is_refused_when_it_is_read(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    valid = file.read_bytes()
    file.write_text(json.dumps({**json.loads(valid), "model_max_length": "many"}))
    try:
        with pytest.raises(ModelDamagedError, match="tokenizer"):
            PolarModel.from_pretrained(folder, ledger=None, device="cpu")
    finally:
        file.write_bytes(valid)
        clear_cache()
