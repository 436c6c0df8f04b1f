"""GGUF files as they are: mixed formats, rows in another order, parity with the file's numbers; and damaged ones."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast

from polar_sdk import PolarModel, Program, lab
from polar_sdk.engine import native
from polar_sdk.engine.forward import next_logits
from polar_sdk.engine.large_pages import LargePages
from polar_sdk.engine.panels import Blocks
from polar_sdk.engine.row import Row
from polar_sdk.errors import DeviceError, ModelDamagedError, ModelError, UnsupportedArchitectureError
from polar_sdk.lab.items import Item, PromptItem
from polar_sdk.models.export import export
from polar_sdk.models.gguf import GgufFile, WeightSource
from polar_sdk.models.load import load_pretrained
from polar_sdk.models.network import read_network
from tests.sdk.engine.test_blocks import some_rows
from tests.sdk.models.conftest import TOKENS, Sizes, finish_gguf, start_gguf

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HIDDEN, INNER, HEADS, GROUPS, LAYERS = 256, 512, 8, 4, 2
MIXED = {"attn_v": "Q6_K", "ffn_down": "Q5_K", "attn_output": "F16", "token_embd": "Q8_0", "": "Q4_K"}
"""The types of a file's matrices by their names: one for all others."""
READ = list(range(20, 45))


_NATIVE = pytest.mark.skipif(not native.comes_along(), reason="there is no library for this processor")


def write(path: Path, types: dict[str, str] = MIXED, *, arch: str = "qwen2", tied: bool = True) -> Path:
    """A random model with matrices of these types."""
    heads, kv_heads = (2, 1) if arch == "qwen3" else (HEADS, GROUPS)  # whose heads are of 128 in transformers' reader
    size = HIDDEN // heads
    writer = start_gguf(path, arch, Sizes(HIDDEN, INNER, heads, kv_heads, LAYERS, 128))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    if arch in {"gemma2", "gemma3", "phi3"}:
        writer.add_key_length(size)
        writer.add_rope_dimension_count(size)
        writer.add_sliding_window(64)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        kind = next((kind for part, kind in types.items() if part in name), "F32") if len(shape) == 2 else "F32"
        if kind not in {"F16", "F32"}:
            rows = some_rows(kind, shape[0], shape[1], len(name))
            writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            values = random.normal(float(len(shape) == 1), 0.05, shape)
            writer.add_tensor(name, values.astype(np.float16 if kind == "F16" else np.float32))

    queries, keys = {"attn_q": HIDDEN}, {"attn_k": kv_heads * size, "attn_v": kv_heads * size}
    qkv = {"attn_qkv": HIDDEN + 2 * kv_heads * size} if arch == "phi3" else queries | keys
    gate_up = {"ffn_up": 2 * INNER} if arch == "phi3" else {"ffn_gate": INNER, "ffn_up": INNER}
    gemma = ("post_attention_norm", "post_ffw_norm") if arch.startswith("gemma") else ()
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm", *gemma):
            add(f"blk.{layer}.{name}.weight", HIDDEN)
        for name in ("attn_q_norm", "attn_k_norm") if arch in {"qwen3", "gemma3"} else ():
            add(f"blk.{layer}.{name}.weight", size)
        for name, outputs in {**qkv, "attn_output": HIDDEN, **gate_up}.items():
            add(f"blk.{layer}.{name}.weight", outputs, HIDDEN)
            if arch == "qwen2" and name in qkv:
                add(f"blk.{layer}.{name}.bias", outputs)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, INNER)
    add("token_embd.weight", len(TOKENS), HIDDEN)
    add("output_norm.weight", HIDDEN)
    if not tied:
        add("output.weight", len(TOKENS), HIDDEN)
    finish_gguf(writer)
    return path


def _logits(loaded: Any) -> torch.Tensor:
    decoder = loaded.decoder
    with torch.inference_mode():
        return next_logits(decoder, [Row(decoder, Program.identity(LAYERS))], [READ])[0]


@_NATIVE
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("arch", "tied"),
    [
        *[("qwen2", True), ("qwen2", False), ("llama", True), ("qwen3", True), ("gemma2", True), ("gemma3", True)],
        ("phi3", False),
    ],
)
def test_a_file_runs_as_it_is(arch: str, tied: bool, tmp_path: Path) -> None:
    """Logits are near those of the file's numbers in float32; no file of weights is written."""
    path = write(tmp_path / "mixed.gguf", arch=arch, tied=tied)
    loaded = load_pretrained(path)
    decoder = loaded.decoder
    assert decoder.dtype_name == "q4_k_m"
    assert isinstance(decoder.layers[0]["qkv"], Blocks)
    assert {form for form, _ in decoder.layers[0]["qkv"].parts} == ({"Q4_K"} if arch == "phi3" else {"Q4_K", "Q6_K"})
    whole: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    with torch.inference_mode():
        expected = whole(torch.tensor([READ])).logits[0, -1]
    got = _logits(loaded)
    assert (got - expected).norm() < 0.05 * expected.norm()
    assert not [file for file in loaded.path.iterdir() if file.suffix in {".safetensors", ".gguf"}]


@_NATIVE
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("pays", [False, True])
def test_maps_are_trained_through_the_weights_of_a_file(
    pays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polar_sdk.lab.healing.distillation._halves_pay", lambda _: pays)
    model = PolarModel.from_pretrained(write(tmp_path / "mixed.gguf"), ledger=None)
    items: list[Item] = [PromptItem(prompt=f"{place} c a b {place * 7} d e f " * 2) for place in range(30)]
    # So large a ridge leaves much to train; without it what is lost is as small as the rounding of halves.
    made = lab.heal(model, items, "1", kind="fill", distil=12, tail=4, ridge=100.0, rate=1e-3, answer_tokens=6)
    (row,) = made.facts.training["held_out"]
    assert row["trained"] < row["closed_form"]


@_NATIVE
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("kind", ["F16", "Q3_K"])
def test_projections_that_the_library_has_no_form_for_stay_beside_the_others(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.gguf", {"attn_k": kind, "ffn_up": kind, "token_embd": kind, "": "Q4_K"})
    own, half = load_pretrained(path).decoder, load_pretrained(path, precision="bf16").decoder
    assert own.dtype_name == "q4_k_m"
    for ours, numbers in zip(own.layers, half.layers, strict=True):
        for name, inputs in {"qkv": HIDDEN, "out": HIDDEN, "gate_up": HIDDEN, "down": INNER}.items():
            assert torch.equal(ours[name].unpack(inputs), numbers[name].unpack(inputs)), name


@_NATIVE
@pytest.mark.usefixtures("cache")
def test_a_file_without_a_form_of_the_library_runs_its_numbers_and_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "other.gguf", {"": "Q3_K"})
    assert load_pretrained(path).decoder.dtype_name == "bfloat16"
    with pytest.raises(DeviceError, match="gguf"):
        load_pretrained(path, precision="gguf")


@pytest.mark.usefixtures("folder")
def test_a_folder_has_no_precision_of_a_file(folder: Path) -> None:
    with pytest.raises(DeviceError, match="gguf"):
        load_pretrained(folder, precision="gguf")


@_NATIVE
def test_a_square_matrix_that_a_file_has_transposed(tmp_path: Path) -> None:
    file = GgufFile(write(tmp_path / "mixed.gguf", {"": "Q4_K"}))
    entry = file.tensors["blk.0.attn_output.weight"]
    turned, plain = (WeightSource(file, entry, turn, entry.shape) for turn in (np.transpose, None))
    wide = turned.numbers(torch.float32)
    assert torch.equal(wide, plain.numbers(torch.float32).T)
    assert torch.equal(turned.numbers(torch.bfloat16), wide.bfloat16())


@_NATIVE
@pytest.mark.usefixtures("cache")
def test_other_precisions_are_made_of_the_same_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.gguf")
    own, wide, half = (_logits(load_pretrained(path, precision=name)) for name in ("auto", "fp32", "bf16"))
    assert (own - wide).norm() < 0.05 * wide.norm()
    assert (half - wide).norm() < 0.02 * wide.norm()
    with pytest.raises(DeviceError, match="gguf"):
        load_pretrained(load_pretrained(path).path.parent, precision="float64")


@_NATIVE
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_the_library_decodes_to_the_same_bits(arch: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.gguf", arch=arch)
    network = read_network(load_pretrained(path).path, [path])
    for _, weight in network.named_parameters():
        origin: Any = weight.source  # type: ignore[attr-defined]
        assert torch.equal(origin.numbers(torch.bfloat16), origin.numbers(torch.float32).bfloat16())


@pytest.mark.usefixtures("cache")
def test_it_is_exported_as_a_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.gguf")
    folder = export(load_pretrained(path, precision="bf16"), Program.identity(LAYERS), tmp_path / "plain")
    plain, own = load_pretrained(folder, precision="bf16"), load_pretrained(path, precision="bf16")
    assert torch.equal(_logits(plain), _logits(own))


@pytest.mark.usefixtures("cache")
def test_without_the_library_numbers_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load_library", lambda *_: False)
    path = write(tmp_path / "mixed.gguf")
    assert load_pretrained(path).decoder.dtype_name in {"bfloat16", "float32"}
    with pytest.raises(DeviceError, match="precision 'gguf'"):
        load_pretrained(path, precision="gguf")


def _cut(content: bytes) -> bytes:
    return content[:-400]


def _header_only(content: bytes) -> bytes:
    return content[:300]


def _other_version(content: bytes) -> bytes:
    return content[:4] + b"\x09" + content[5:]


def _endless(content: bytes) -> bytes:
    return content[:8] + b"\xff" * 16 + content[24:]


def _number(content: bytes, name: bytes, value: int) -> bytes:
    """With another value of 32 bits."""
    at = content.index(name) + len(name) + 4
    return content[:at] + value.to_bytes(4, "little") + content[at + 4 :]


def _many_layers(content: bytes) -> bytes:
    return _number(content, b".block_count", 10**9)


def _some_layers(content: bytes) -> bytes:
    return _number(content, b".block_count", 4_000)


def _array_beyond_the_file(_: bytes) -> bytes:
    """A header alone: an array of 2^26 bytes, which are not there."""
    name = b"tokenizer.ggml.token_type"
    return b"GGUF" + struct.pack(f"<IQQQ{len(name)}sIIQ", 3, 0, 1, len(name), name, 9, 0, 2**26)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    "spoil",
    [_cut, _header_only, _other_version, _endless, _many_layers, _some_layers, _array_beyond_the_file],
)
def test_a_damaged_file_is_one_clear_error(spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.gguf")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ModelDamagedError, match=r"mixed\.gguf") as raised:
        load_pretrained(path)
    assert "\n" not in str(raised.value)
    with pytest.raises(ModelDamagedError):
        GgufFile(path)  # whatever it counts is compared with the file before anything is built


@pytest.mark.usefixtures("cache")
def test_a_type_that_nobody_knows(tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.gguf")
    content = path.read_bytes()
    at = content.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    path.write_bytes(content[:at] + (200).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(UnsupportedArchitectureError, match=r"token_embd\.weight.*200"):
        load_pretrained(path)


@pytest.mark.usefixtures("cache")
def test_a_file_without_a_tensor(tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.9.ffn_up.weight"))
    with pytest.raises(ModelError, match=r"up_proj"):
        load_pretrained(path)


@pytest.mark.usefixtures("cache")
def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(ModelError, match="full"):
        load_pretrained(write(tmp_path / "mixed.gguf"))


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.gguf")
    file = GgufFile(path)
    entry = file.tensors["output_norm.weight"]
    assert file.read(entry).nbytes == 4 * HIDDEN
    os.truncate(path, entry.start)
    with pytest.raises(ModelDamagedError, match="changed"):
        file.read(entry)


@_NATIVE
@pytest.mark.parametrize("change", ["cut", "touched"])
def test_a_file_that_changes_while_a_matrix_is_packed(change: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.gguf")
    file = GgufFile(path)
    entry = file.tensors["blk.1.ffn_gate.weight"]
    if change == "cut":
        os.truncate(path, entry.start + entry.size - 1)
    else:
        os.utime(path, ns=(0, 0))
    stored = WeightSource(file, entry, None, entry.shape).stored(LargePages(), None)
    assert stored is not None
    with pytest.raises(ModelDamagedError, match=r"mixed\.gguf.*changed"):
        Blocks.of([stored], None)


@_NATIVE
@pytest.mark.usefixtures("cache")
def test_a_scale_that_is_not_finite_is_one_clear_error(tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.gguf")
    entry = GgufFile(path).tensors["blk.1.ffn_gate.weight"]
    content = bytearray(path.read_bytes())
    content[entry.start : entry.start + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(content)
    with pytest.raises(ModelDamagedError, match=r"blk\.1\.ffn_gate\.weight.*not finite"):
        load_pretrained(path)
