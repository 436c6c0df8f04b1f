"""Draft heads as files: read back whole, refused where one is damaged or another model's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from polar_sdk import PolarModel
from polar_sdk.engine.draft_head import DraftHead
from polar_sdk.errors import DraftHeadDamagedError, DraftHeadError, PolarError
from polar_sdk.models.draft_heads import DraftHeadFacts, DraftHeadFile, find_draft_head, saved_head_path
from polar_sdk.testing import random_draft_head, tiny_llama, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

FACTS = DraftHeadFacts(model="tiny", fingerprint="f" * 64, answers=1, tokens=1, data="")


def _file(tokens: Sequence[int] = range(9), width: int = 48, fingerprint: str = FACTS.fingerprint) -> DraftHeadFile:
    facts = FACTS.model_copy(update={"fingerprint": fingerprint})
    return DraftHeadFile(random_draft_head(width, tokens), facts)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    head = _file()
    assert head.save(tmp_path / "new" / "head.safetensors") == tmp_path / "new" / "head.safetensors"
    read = DraftHeadFile.load(tmp_path / "new" / "head.safetensors")
    assert read.facts == head.facts
    assert read.tensors.keys() == head.tensors.keys()
    assert all(torch.equal(value, head.tensors[name]) for name, value in read.tensors.items())
    assert read.parameters == 48 * (2 * 48 + 3 * 32 + 2)


def test_a_head_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _file().save(tmp_path / "head.safetensors")

    def full(file: Path, data: bytes) -> None:
        with file.open("wb") as half:
            half.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        _file(range(20)).save(path)
    monkeypatch.undo()
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert len(DraftHeadFile.load(path).tensors["tokens"]) == 9


@pytest.mark.parametrize(
    ("facts", "changed", "what"),
    [
        (None, {}, "JSON"),
        ("[]", {}, "facts"),
        ("{}", {}, "its format is None, not 'polar-drafts-2'"),
        ('{"format": "polar-drafts-2"}', {}, "facts: model: Field required"),
        (FACTS.model_copy(update={"format": "polar-drafts-9"}).model_dump_json(), {}, "'polar-drafts-9', not 'polar"),
        (FACTS.model_dump_json(), {"scale": None}, "tensors do not form a head"),
        (FACTS.model_dump_json(), {"scale": torch.ones(47)}, "tensors do not form a head"),
        (FACTS.model_dump_json(), {"scale": torch.full((48,), torch.nan)}, "tensors do not form a head"),
        (FACTS.model_dump_json(), {"gated": torch.ones(63, 48)}, "tensors do not form a head"),
        (FACTS.model_dump_json(), {"enter": torch.ones(48, 96, dtype=torch.int32)}, "tensors do not form a head"),
        (FACTS.model_dump_json(), {"tokens": torch.ones(9)}, "tensors do not form a head"),
        (FACTS.model_dump_json(), {"tokens": torch.ones(0, dtype=torch.int32)}, "tensors do not form a head"),
        (FACTS.model_dump_json(), {"more": torch.ones(2)}, "tensors do not form a head"),
    ],
)
def test_a_damaged_head_is_one_clear_line(tmp_path: Path, facts: str | None, changed: Any, what: str) -> None:
    path = tmp_path / "head.safetensors"
    tensors = {name: value for name, value in {**_file().tensors, **changed}.items() if value is not None}
    save_file(tensors, path, metadata=None if facts is None else {"facts": facts})
    with pytest.raises(DraftHeadDamagedError) as error:
        DraftHeadFile.load(path)
    message = str(error.value)
    assert what in message
    assert str(path) in message
    assert "`polar lab drafts`" in message
    assert "\n" not in message


def test_a_file_that_is_cut_short_or_missing_is_damaged(tmp_path: Path) -> None:
    path = _file().save(tmp_path / "head.safetensors")
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DraftHeadDamagedError, match="is damaged"):
            DraftHeadFile.load(path)
    path.unlink()
    with pytest.raises(DraftHeadDamagedError, match="is damaged"):
        DraftHeadFile.load(path)


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path))
    return tmp_path


def _model() -> PolarModel:
    network = tiny_llama(tie_word_embeddings=True, max_position_embeddings=512)
    return PolarModel.from_hf(network, tiny_tokenizer(), ledger=None)


def test_a_model_is_loaded_with_its_own_head(cache: Path) -> None:
    model = _model()
    assert model.decoder.draft_head is None
    _file(range(50), fingerprint=model.fingerprint).save(saved_head_path(model.fingerprint))
    own = _model()
    assert isinstance(own.decoder.draft_head, DraftHead)
    assert own.decoder.draft_head.tokens.tolist() == list(range(50))
    drafted = own.generate("Hello", max_tokens=40, speculate="auto")
    assert drafted.usage.tokens.drafted > 0
    assert drafted.token_ids == model.generate("Hello", max_tokens=40).token_ids


def test_what_cannot_be_used_is_passed_over_with_a_warning(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = _model()
    path = saved_head_path(model.fingerprint)
    for head, what in (
        (_file(), "made for model tiny (ffffffffffff…), but this model is"),
        (_file([1, 999], fingerprint=model.fingerprint), "guesses token 999, but ids of this model are 0 to"),
        (_file(width=32, fingerprint=model.fingerprint), "reads states of 32 numbers, but those of this model have 48"),
    ):
        head.save(path)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert find_draft_head(model.fingerprint, model.decoder) is None
        assert what in caplog.text
    table = FACTS.model_copy(update={"format": "polar-drafts-1"}).model_dump_json()
    save_file({"keys": torch.ones(2)}, path, metadata={"facts": table})
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert find_draft_head(model.fingerprint, model.decoder) is None
    assert "is a draft table of an earlier version" in caplog.text
    path.write_bytes(b"nothing")
    with caplog.at_level(logging.WARNING):
        answer = _model().generate("Hello", max_tokens=5, speculate="auto")
    assert "is damaged" in caplog.text
    assert answer.token_ids == model.generate("Hello", max_tokens=5).token_ids


def test_errors_are_of_the_packages_tree() -> None:
    assert issubclass(DraftHeadError, PolarError)
    assert issubclass(DraftHeadDamagedError, DraftHeadError)


@pytest.mark.model
def test_the_default_model_has_one() -> None:
    model = PolarModel.from_pretrained(ledger=None)
    head = find_draft_head(model.fingerprint, model.decoder)
    assert head is not None
    assert head.facts.fingerprint == model.fingerprint
    assert head.facts.right is not None
    assert head.facts.right > 0.4
