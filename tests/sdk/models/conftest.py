"""Small real models: a random Llama folder, another as a GGUF file, and that file in a wheel."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch
from gguf.vocab import bytes_to_unicode
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from polar_sdk.models.aliases import Alias
from polar_sdk.models.load import clear_cache

if TYPE_CHECKING:
    from collections.abc import Iterator

HIDDEN, INNER, HEADS, LAYERS, WINDOW = 32, 64, 4, 2, 64
BYTES = sorted(bytes_to_unicode().values())
TOKENS = ["<|end|>", *BYTES, "he"]  # one merge, because the GGUF reader wants some


@pytest.fixture(autouse=True)
def no_weights_in_memory() -> Iterator[None]:
    clear_cache()
    yield
    clear_cache()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, in force for this test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("POLAR_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def saved_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=WINDOW,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(TOKENS)}, merges=[("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrap: Any = PreTrainedTokenizerFast  # untyped
    wrap(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved_folder: Path, tmp_path: Path, cache: Path) -> Path:
    """A model folder that the test may spoil."""
    return Path(shutil.copytree(saved_folder, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "Tiny.gguf"
    _write_gguf(path)
    return path


@dataclass(frozen=True)
class Carried:
    """An alias whose wheel lies in a folder, as on a package index."""

    alias: Alias
    wheel: Path


@pytest.fixture(scope="session")
def carried(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Carried:
    wheel = tmp_path_factory.mktemp("index") / "polar_tiny-1.0-py3-none-any.whl"
    _write_wheel(wheel, gguf_file)
    alias = Alias(
        name="tiny",
        distribution="polar-tiny",
        version="1.0",
        wheel=wheel.name,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        member="polar_tiny/Tiny.gguf",
        gguf_sha256=hashlib.sha256(gguf_file.read_bytes()).hexdigest(),
        space_bytes=1_000_000,
        licence="Apache-2.0",
    )
    return Carried(alias, wheel)


@pytest.fixture
def index(carried: Carried, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip configured to find the wheel of `carried`, and nothing else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(carried.wheel.parent))
    return carried.wheel.parent


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model in a GGUF file."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    layers: int
    window: int


def start_gguf(path: Path, arch: str, sizes: Sizes) -> gguf.GGUFWriter:
    """A GGUF file of an architecture with the tokens of this module; its tensors are still to be added."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(sizes.layers)
    writer.add_context_length(sizes.window)
    writer.add_embedding_length(sizes.hidden)
    writer.add_feed_forward_length(sizes.inner)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")
    return writer


def finish_gguf(writer: gguf.GGUFWriter) -> None:
    """Write the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_gguf(path: Path) -> None:
    writer = start_gguf(path, "llama", Sizes(HIDDEN, INNER, HEADS, HEADS, LAYERS, WINDOW))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    random = np.random.default_rng(0)
    for name, shape in _gguf_shapes().items():
        writer.add_tensor(name, random.standard_normal(shape, dtype=np.float32))
    finish_gguf(writer)


def _gguf_shapes() -> dict[str, tuple[int, ...]]:
    layer = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (HIDDEN, HIDDEN),
        "attn_v": (HIDDEN, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in layer.items()
    }
    return shapes | {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}


def _write_wheel(path: Path, gguf_file: Path) -> None:
    info = "polar_tiny-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.write(gguf_file, "polar_tiny/Tiny.gguf")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: polar-tiny\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
