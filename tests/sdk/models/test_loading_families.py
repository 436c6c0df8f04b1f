"""Every family read from a folder, layer by layer, beside the same weights in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from polar_sdk import Program
from polar_sdk.engine.decoder import build_decoder
from polar_sdk.engine.forward import next_logits
from polar_sdk.engine.row import Row
from polar_sdk.errors import UnsupportedArchitectureError
from polar_sdk.models.load import clear_cache, load_pretrained
from polar_sdk.models.network import map_weights
from polar_sdk.testing import tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from polar_sdk.engine.decoder import Decoder

TOKENS = list(range(40, 60))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_gives_what_the_model_in_memory_gives(
    variant: str, dtype: torch.dtype, tiny_family: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = tiny_family(variant)
    folder = _save(model, tmp_path, max_shard_size="40KB")
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    read = load_pretrained(folder, device="cpu", precision=precision).decoder
    clear_cache()
    in_memory = build_decoder(_cast(model, dtype))
    in_memory.use_library()
    every = ([decoder.start, *decoder.layers, decoder.ends] for decoder in (read, in_memory))
    for ours, theirs in zip(*every, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            for one, other in zip(_tensors(ours[name]), _tensors(theirs[name]), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert torch.equal(_logits(read), _logits(in_memory))


def test_a_model_keeps_no_file_in_memory(tiny_family: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not tell what is mapped")
    folder = _save(tiny_family("llama, tied embeddings"), tmp_path)
    loaded = load_pretrained(folder, device="cpu", precision="fp32")
    assert loaded.decoder.layers
    assert str(folder) not in maps.read_text()
    clear_cache()


def test_the_mapping_of_a_layer_ends_with_its_last_tensor(tmp_path: Path) -> None:
    maps, file = Path("/proc/self/maps"), tmp_path / "weights.safetensors"
    if not maps.exists():
        pytest.skip("this system does not tell what is mapped")
    page = torch.ones(64, 64)
    save_file({f"h.{layer}.{part}": page.clone() for layer in range(3) for part in "ab"} | {"head": page}, file)

    def mapped() -> int:
        return maps.read_text().count(str(file))

    weights = map_weights([file])
    assert mapped() == 4
    del weights["h.1.a"]
    assert mapped() == 4
    del weights["h.1.b"]
    assert mapped() == 3
    assert torch.equal(weights["h.2.b"], page)
    weights.clear()
    assert mapped() == 0


def test_mapped_weights_are_those_of_the_file(tmp_path: Path) -> None:
    made: dict[str, Tensor] = {
        "x.0.wide": torch.randn(3, 5, dtype=torch.float64),
        "x.0.narrow": torch.randn(7).bfloat16(),
        "x.1.flags": torch.tensor([True, False, True]),
        "x.1.numbers": torch.arange(5, dtype=torch.int32),
        "one": torch.tensor(2.5),
        "none": torch.empty(0, 4),
    }
    save_file(made, tmp_path / "a.safetensors", {"format": "pt"})
    save_file({"x.2.half": torch.randn(9, 2).half()}, tmp_path / "b.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    expected = load_file(files[0]) | load_file(files[1])
    found = map_weights(files)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert torch.equal(found[name], value)


def test_a_dtype_that_the_engine_does_not_run(tmp_path: Path) -> None:
    save_file({"x.0.w": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedArchitectureError, match=r"weight x\.0\.w is stored as F8_E4M3, .* choose from: F64"):
        map_weights([tmp_path / "a.safetensors"])


def _save(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy whose weights, and they alone, are of this dtype: the rotary frequencies stay exact."""
    copied: PreTrainedModel = type(model)(model.config)
    copied.load_state_dict(model.state_dict())
    for weight in copied.parameters():
        weight.data = weight.data.to(dtype)
    copied.train(False)
    return copied


def _logits(decoder: Decoder) -> Tensor:
    return next_logits(decoder, [Row(decoder, Program.identity(decoder.depth))], [TOKENS])


def _tensors(value: Any) -> list[Tensor]:
    parts = [value] if isinstance(value, torch.Tensor) else list(value or ())
    return [part for part in parts if part is not None]
