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

from polar_sdk.models.aliases import Alias, Part
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
    """An alias whose wheels are in a folder, as on a package index."""

    alias: Alias
    wheels: tuple[Path, ...]


@pytest.fixture(scope="session")
def carried(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Carried:
    """One wheel with the whole file."""
    return _carried(gguf_file, tmp_path_factory.mktemp("index"), 1)


@pytest.fixture(scope="session")
def carried_in_parts(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Carried:
    """Three wheels with a piece of the file each."""
    return _carried(gguf_file, tmp_path_factory.mktemp("index"), 3)


def _carried(gguf_file: Path, folder: Path, pieces: int) -> Carried:
    content, wheels, parts = gguf_file.read_bytes(), list[Path](), list[Part]()
    size = -(-len(content) // pieces)
    for number in range(pieces):
        distribution = "polar-tiny" if pieces == 1 else f"polar-tiny-part{number + 1}"
        piece, package = content[number * size :][:size], distribution.replace("-", "_")
        wheel, member = folder / f"{package}-1.0-py3-none-any.whl", f"{package}/data/part.bin"
        _write_wheel(wheel, distribution, {member: piece})
        sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
        parts.append(Part(distribution, "1.0", wheel.stat().st_size, sha256, member, len(piece)))
        wheels.append(wheel)
    alias = Alias(
        name="tiny",
        gguf="Tiny.gguf",
        gguf_sha256=hashlib.sha256(content).hexdigest(),
        parts=tuple(parts),
        licence="Apache-2.0",
        runs_as_file=False,
    )
    return Carried(alias, tuple(wheels))


@pytest.fixture
def index(carried: Carried, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip configured to find the wheel of `carried`, and nothing else."""
    return _configure_pip(carried, monkeypatch)


@pytest.fixture
def index_of_parts(carried_in_parts: Carried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip configured to find copies of the wheels of `carried_in_parts`, which the test may spoil."""
    folder = tmp_path / "index"
    folder.mkdir()
    copies = tuple(Path(shutil.copy(wheel, folder)) for wheel in carried_in_parts.wheels)
    return _configure_pip(Carried(carried_in_parts.alias, copies), monkeypatch)


def _configure_pip(carried: Carried, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(carried.wheels[0].parent))
    return carried.wheels[0].parent


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


def _write_wheel(path: Path, distribution: str, files: dict[str, bytes]) -> None:
    info = f"{distribution.replace('-', '_')}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
