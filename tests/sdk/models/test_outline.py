"""The outline of a GGUF file's network beside transformers' class, and what loading such a file imports."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from polar_sdk.engine.families import find_family
from polar_sdk.errors import ModelDamagedError
from polar_sdk.models.load import load_pretrained
from polar_sdk.models.network import read_network
from polar_sdk.models.outline import read_outline, weights_of
from tests.sdk.models.test_gguf import write

if TYPE_CHECKING:
    from pathlib import Path

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ARCHITECTURES = [("qwen2", True), ("qwen2", False), ("llama", True), ("llama", False), ("qwen3", True)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LlamaConfig, {}),
        (LlamaConfig, {"attention_bias": True}),
        (LlamaConfig, {"mlp_bias": True, "head_dim": 16}),
        (Qwen2Config, {}),
        (Qwen3Config, {"head_dim": 24}),
        (Qwen3Config, {"head_dim": 24, "attention_bias": True}),
    ],
)
def test_names_and_shapes_are_those_of_the_class(kind: Any, options: dict[str, Any], tied: bool) -> None:
    config = kind(**SIZES, **options, tie_word_embeddings=tied)
    with torch.device("meta"):
        network: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    network.tie_weights()
    plain = PreTrainedConfig.from_dict(config.to_dict())
    assert {name: shape for _, name, shape in weights_of(plain)} == {
        name: tuple(weight.shape) for name, weight in network.named_parameters()
    }
    theirs, ours = vars(find_family(config)), vars(find_family(plain))
    assert ours == theirs


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("arch", "tied"), ARCHITECTURES)
def test_a_decoder_gets_the_same_of_both(arch: str, tied: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.gguf", arch=arch, tied=tied)
    folder = load_pretrained(path).path
    network, outline = read_network(folder, [path]), read_outline(folder, path)
    assert outline is not None
    theirs, ours = (dict[str, Any](each.named_parameters()) for each in (network, outline))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight.source.numbers(torch.float32), theirs[name].source.numbers(torch.float32)), name
    tables: Any = network.get_output_embeddings(), network.get_input_embeddings()  # type: ignore[no-untyped-call]
    assert (tables[0].weight is tables[1].weight) == tied
    tables = outline.get_output_embeddings(), outline.get_input_embeddings()  # type: ignore[no-untyped-call]
    assert (tables[0].weight is tables[1].weight) == tied


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_angles_are_those_of_the_class_to_the_bit(rope: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.gguf", arch="llama")
    folder = load_pretrained(path).path
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_theta": 10_000.0, **rope}}))
    network, outline = read_network(folder, [path]), read_outline(folder, path)
    assert outline is not None
    family = find_family(network.config)
    for dtype in (torch.float32, torch.bfloat16):
        theirs, ours = (
            family.rotary_tables(family.take_rotary(each), 300, dtype, torch.device("cpu"))
            for each in (network, outline)
        )
        for pair in zip(theirs, ours, strict=True):
            assert all(map(torch.equal, *pair))


@pytest.mark.usefixtures("cache")
def test_an_architecture_without_an_outline(tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.gguf", arch="gemma2")
    assert read_outline(load_pretrained(path).path, path) is None


@pytest.mark.usefixtures("cache")
def test_a_tensor_of_another_size_is_one_clear_error(tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.gguf")
    folder = load_pretrained(path).path
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 768}))
    with pytest.raises(ModelDamagedError, match=r"ffn_gate\.weight.*\(512, 256\).*\(768, 256\)"):
        read_outline(folder, path)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_the_tokenizer_is_the_one_that_its_class_makes_of_the_files(arch: str, tmp_path: Path) -> None:
    loaded = load_pretrained(write(tmp_path / "mixed.gguf", arch=arch))
    theirs, ours = AutoTokenizer.from_pretrained(loaded.path), loaded.tokenizer
    for text in ("he said: don't!", "  two\n\n lines\t", "é 日本 😀", "<|end|>he<|end|>", "12345"):
        for options in ({}, {"add_special_tokens": False}, {"split_special_tokens": True}):
            ids = theirs.encode(text, **options)
            assert ours.encode(text, **options) == ids, (text, options)
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.all_special_ids == theirs.all_special_ids
    assert repr(ours.added_tokens_decoder) == repr(theirs.added_tokens_decoder)
    assert ours.chat_template == theirs.chat_template


@pytest.mark.usefixtures("cache")
def test_loading_a_file_again_imports_no_class_of_a_network(tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.gguf")
    load_pretrained(path)
    program = (
        "import sys\n"
        "from polar_sdk import PolarModel\n"
        "PolarModel.from_pretrained(sys.argv[1], ledger=None).generate('he', max_tokens=2, template='raw')\n"
        "print(*{'transformers.modeling_utils', 'transformers.models', 'sympy'}.intersection(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
