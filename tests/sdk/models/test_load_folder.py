"""Loading a model folder: shared weights, fingerprint, damage."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as voice

from polar_sdk.errors import InvalidRequestError, ModelDamagedError, ModelNotFoundError, UnsupportedArchitectureError
from polar_sdk.model import PolarModel
from polar_sdk.models.fingerprint import file_sha256, fingerprint_of
from polar_sdk.models.load import clear_cache, load_pretrained

if TYPE_CHECKING:
    from pathlib import Path

    from polar_sdk.serving.loaded import LoadedModel


def test_loads(folder: Path) -> None:
    loaded = load_pretrained(folder, device="cpu", precision="fp32")
    assert (loaded.name, loaded.path) == (str(folder), folder.resolve())
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), torch.float32)
    assert loaded.decoder.dtype is torch.float32
    assert loaded.config.num_hidden_layers == 2
    assert loaded.generation_config.eos_token_id == 0
    text = "héllo ✓"
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(text, add_special_tokens=False)) == text


def test_same_weights_for_the_same_question(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_pretrained(folder, precision="float32")
    assert load_pretrained(folder, precision="fp32") is first
    monkeypatch.chdir(folder.parent)
    other_name = load_pretrained("./tiny", precision="fp32")
    assert other_name.name == "./tiny"
    assert other_name.decoder is first.decoder
    assert load_pretrained(folder, precision="bf16").decoder is not first.decoder
    clear_cache()
    assert load_pretrained(folder, precision="fp32").decoder is not first.decoder


def test_threads_load_once(folder: Path) -> None:
    ready = threading.Barrier(8)

    def load(_: int) -> LoadedModel:
        ready.wait()
        return load_pretrained(folder, precision="fp32")

    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(load, range(8)))
    assert len({id(one.decoder) for one in loaded}) == 1


def test_settings_of_transformers_are_put_back(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    level, bars = voice.get_verbosity(), voice.is_progress_bar_enabled()
    load_pretrained(folder, precision="fp32")
    (folder / "tokenizer.json").write_text("{")
    clear_cache()
    with pytest.raises(ModelDamagedError, match="tokenizer"):
        load_pretrained(folder, precision="fp32")
    assert (voice.get_verbosity(), voice.is_progress_bar_enabled()) == (level, bars)
    assert torch.get_default_dtype() is torch.float32
    assert capfd.readouterr() == ("", "")


def test_fingerprint_ignores_dtype_name_and_place(folder: Path, saved_folder: Path) -> None:
    expected = load_pretrained(folder, precision="fp32").fingerprint
    assert len(expected) == 64
    clear_cache()
    assert load_pretrained(folder, precision="fp32").fingerprint == expected
    assert load_pretrained(folder, precision="bf16").fingerprint == expected
    assert load_pretrained(saved_folder, precision="fp32").fingerprint == expected
    _edit_config(folder, transformers_version="9.9", dtype="float16", _name_or_path="elsewhere")
    assert load_pretrained(folder, precision="fp32").fingerprint == expected


def test_fingerprint_follows_configuration_and_weights(folder: Path) -> None:
    first = load_pretrained(folder, precision="fp32")
    _edit_config(folder, rms_norm_eps=1e-3)
    second = load_pretrained(folder, precision="fp32")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    third = load_pretrained(folder, precision="fp32")
    assert len({first.fingerprint, second.fingerprint, third.fingerprint}) == 3
    assert third.decoder is not first.decoder


def test_fingerprint_in_memory(folder: Path) -> None:
    read: Any = AutoModelForCausalLM.from_pretrained
    model = read(folder, dtype=torch.bfloat16)
    rounded = fingerprint_of(model)
    assert fingerprint_of(model.to(torch.float32)) == rounded  # bfloat16 values, held in another dtype
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert fingerprint_of(model) != rounded


def test_hashes_are_remembered_until_the_file_changes(folder: Path, cache: Path) -> None:
    path = folder / "config.json"
    before = file_sha256(path)
    remembered = json.loads((cache / "file-hashes.json").read_text())
    remembered[str(path)][2] = "from the cache"
    (cache / "file-hashes.json").write_text(json.dumps(remembered))
    read = "import sys, pathlib; from polar_sdk.models.fingerprint import file_sha256 as read; "
    read += "print(read(pathlib.Path(sys.argv[1])))"
    again = subprocess.run([sys.executable, "-c", read, str(path)], capture_output=True, text=True, check=True)
    assert again.stdout.strip() == "from the cache"  # another process, which has read nothing yet
    path.write_text(path.read_text() + "\n")
    assert file_sha256(path) not in (before, "from the cache")
    (cache / "file-hashes.json").write_text("not JSON")
    assert len(file_sha256(path)) == 64


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelDamagedError, match=r"model\.safetensors' is damaged .*Copy or fetch"):
        load_pretrained(folder)


def test_missing_tensor_is_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelDamagedError, match=r"missing keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_pretrained(folder)


def test_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelDamagedError, match=r"lacks model-1\.safetensors, model-2\.safetensors"):
        load_pretrained(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match="no safetensors weights"):
        load_pretrained(folder)


def test_folder_without_a_model(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json is missing"):
        load_pretrained(tmp_path)


def test_other_architecture_is_refused_before_its_weights_are_read(folder: Path) -> None:
    _edit_config(folder, model_type="mamba")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedArchitectureError, match=r"'mamba' is not supported; choose from: .*llama"):
        load_pretrained(folder)


def test_revision_of_a_folder(folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match="revision 'v1' does not apply"):
        load_pretrained(folder, revision="v1")


def _edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_chat_template_changed_in_place_is_read_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    template = folder / "chat_template.jinja"
    template.write_text("OLD {{ messages[0]['content'] }}")
    before = PolarModel.from_pretrained(folder, precision="fp32", ledger=None)
    template.write_text("NEW {{ messages[0]['content'] }}")
    after = PolarModel.from_pretrained(folder, precision="fp32", ledger=None)
    assert after.decode(after.prompt_tokens("hi")).startswith("NEW")
    assert before.decode(before.prompt_tokens("hi")).startswith("OLD")  # it keeps what it was made with
    assert after.decoder is before.decoder
    assert "have changed: read again" in caplog.text
    caplog.clear()
    again = PolarModel.from_pretrained(folder, precision="fp32", ledger=None)
    assert again.decode(again.prompt_tokens("hi")).startswith("NEW")
    assert not caplog.text


def test_generation_settings_changed_in_place_are_read_again(folder: Path) -> None:
    assert load_pretrained(folder, precision="fp32").generation_config.eos_token_id == 0
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    assert 7 in load_pretrained(folder, precision="fp32").end_tokens
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelDamagedError, match="generation settings"):
        load_pretrained(folder, precision="fp32")
