"""A draft head is trained on what a model says: to questions of its own or to given ones, and is right about it."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from polar_sdk import PolarModel, lab
from polar_sdk.errors import DataError, DraftHeadError
from polar_sdk.lab import drafting
from polar_sdk.lab.rewards.cache import RewardCache
from polar_sdk.models.draft_heads import DraftHeadFile, saved_head_path
from polar_sdk.testing import tiny_llama, tiny_tokenizer
from tests.sdk.command import polar
from tests.sdk.repeating import repeating_llama

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path))
    monkeypatch.setattr(drafting, "_RATE", 0.01)  # so little is to be learned that it need not take long
    return tmp_path


def _model() -> PolarModel:
    """A tiny model whose layers change states little, so that what it says can be learned."""
    return PolarModel.from_hf(repeating_llama(0.05), tiny_tokenizer(), ledger=None)


def _prompts(count: int) -> list[lab.Item]:
    return [lab.PromptItem(prompt=f"prompt {number}") for number in range(count)]


def _same(first: Path, second: Path) -> bool:
    ours, theirs = load_file(first), load_file(second)
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_it_learns_what_a_model_says(cache: Path) -> None:
    model, seen = _model(), list[tuple[str, int, int]]()
    items = [*_prompts(40), lab.AnswerItem(prompt="prompt 3", answer="x")]
    items.append(lab.ChoiceItem(question="?", choices=("a", "b"), answer=0))
    brief = lab.train_draft_head(model, items, out=cache / "brief", answer_tokens=40, units=64, epochs=1)
    head = lab.train_draft_head(
        model, items, answer_tokens=40, units=64, epochs=20, on_progress=lambda *step: seen.append(step)
    )
    answers = [model.generate(f"prompt {number}", max_tokens=40).token_ids for number in range(40) if number % 10 != 9]
    assert (head.facts.answers, head.facts.tokens) == (36, sum(map(len, answers)))
    assert head.facts.fingerprint == model.fingerprint
    assert head.facts.options["epochs"] == 20
    assert None not in (brief.facts.right, brief.facts.guessed, head.facts.right, head.facts.guessed)
    assert head.facts.right > brief.facts.right + 0.1  # type: ignore[operator]
    assert head.facts.guessed > max(head.facts.right, brief.facts.guessed)  # type: ignore[type-var, operator]
    assert [step for step in seen if step[1] == step[2]] == [
        ("identity's answers", 40, 40),
        ("states", 36, 36),
        ("training", 60, 60),
        ("held-out states", 4, 4),
    ]


def test_what_it_learned_is_used(cache: Path) -> None:
    model = _model()
    lab.train_draft_head(model, _prompts(12), answer_tokens=40, units=64, epochs=40, seed=2)
    fresh = _model()
    plain = model.generate("prompt 3", max_tokens=40)
    tokens = {name: fresh.generate("prompt 3", max_tokens=40, speculate=name) for name in ("off", "auto")}
    assert tokens["off"].token_ids == tokens["auto"].token_ids == plain.token_ids
    assert tokens["auto"].usage.tokens.accepted > 0


def test_only_the_most_frequent_tokens_are_guessed(cache: Path) -> None:
    model = _model()
    head = lab.train_draft_head(model, _prompts(12), answer_tokens=20, vocabulary=7, epochs=1)
    answers = [model.generate(f"prompt {number}", max_tokens=20).token_ids for number in range(12) if number % 10 != 9]
    times = torch.tensor([token for answer in answers for token in answer]).bincount(minlength=300)
    guessed = head.tensors["tokens"].tolist()
    assert len(guessed) == 7
    left_out = [token for token in range(300) if token not in guessed]
    assert min(times[guessed]) >= max(times[left_out])


def test_a_model_asks_itself(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked, answered = _model(), list[Any](), list[str]()
    generate, answer = model.generate_batch, model.greedy_answers

    def noted(prompts: Any, **options: Any) -> Any:
        asked.append((prompts, options))
        return generate(prompts, **options)

    def answers(prompts: Any, **options: Any) -> Any:
        answered.extend(prompts)
        return answer(prompts, **options)

    monkeypatch.setattr(model, "generate_batch", noted)
    monkeypatch.setattr(model, "greedy_answers", answers)
    kept = RewardCache()
    options: dict[str, Any] = {"answer_tokens": 8, "seed": 3, "epochs": 1}
    head = lab.train_draft_head(model, cache=kept, questions=140, **options)
    starts, asking = asked[0]
    whole = model.prompt_tokens("Hello there")
    assert whole[: len(starts[0])] == starts[0]
    assert model.decode(whole[len(starts[0]) :]).startswith("Hello there")
    assert [len(prompts) for prompts, _ in asked] == [128, 12]
    assert [own["seed"] for own in asked[1][1]["each"]] == list(range(131, 143))
    assert asking["temperature"] == 1.0
    assert 0 < len(answered) == len(set(answered)) < 140  # some had no end
    assert head.facts.answers == len(answered) - len(answered) // 10
    questions, answered[:], asked[:] = set(answered), [], []
    lab.train_draft_head(model, cache=kept, questions=150, **options)
    assert [len(prompts) for prompts, _ in asked] == [10]
    assert not questions & set(answered)
    answered[:], asked[:] = [], []
    lab.train_draft_head(model, _prompts(5), cache=kept, questions=150, **options)  # both
    assert not asked
    assert answered == [f"prompt {number}" for number in range(5)]


def test_answers_that_were_interrupted_go_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = _model(), RewardCache()
    answer, calls = model.greedy_answers, list[int]()

    def interrupted(prompts: Any, **options: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(prompts, **options)

    monkeypatch.setattr(model, "greedy_answers", interrupted)
    options: dict[str, Any] = {"answer_tokens": 4, "epochs": 1}
    with pytest.raises(KeyboardInterrupt):
        lab.train_draft_head(model, _prompts(150), cache=kept, **options)
    assert not saved_head_path(model.fingerprint).exists()
    lab.train_draft_head(model, _prompts(150), cache=kept, **options)
    assert calls == [128, 22, 22]


def test_training_that_was_interrupted_ends_where_it_would_have(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafting, "_CHECKPOINT_EVERY", 5)
    model, kept, folder = _model(), RewardCache(), tmp_path / "checkpoints"
    options: dict[str, Any] = {"answer_tokens": 30, "epochs": 12, "cache": kept, "units": 16}
    lab.train_draft_head(model, _prompts(40), out=cache / "whole", **options)
    steps = list[int]()

    def interrupt(stage: str, done: int, _: int) -> None:
        if stage == "training":
            steps.append(done)
            if done == 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.train_draft_head(
            model, _prompts(40), out=cache / "half", checkpoints=folder, on_progress=interrupt, **options
        )
    assert not (cache / "half").exists()
    assert list(folder.iterdir())
    steps.clear()
    lab.train_draft_head(
        model,
        _prompts(40),
        out=cache / "half",
        checkpoints=folder,
        on_progress=lambda stage, done, _: steps.append(done) if stage == "training" else None,
        **options,
    )
    assert steps[0] == 9
    assert not folder.exists()
    assert _same(cache / "half", cache / "whole")
    lab.train_draft_head(model, _prompts(40), out=cache / "other", checkpoints=folder, **options | {"seed": 1})
    assert not _same(cache / "other", cache / "whole")


def test_a_place_that_cannot_be_written_is_named_before_anything_runs(cache: Path) -> None:
    model = _model()
    (cache / "file").write_text("")
    for out, what in (
        (cache / "file" / "head", "Not a directory|File exists"),
        (cache, "it is a folder; name a file"),
    ):
        with pytest.raises(DraftHeadError, match=f"{out}' cannot be written: ({what})"):
            lab.train_draft_head(
                model, [lab.PromptItem(prompt="a")], out=out, on_progress=lambda *_: pytest.fail("ran")
            )


def test_what_it_cannot_be_trained_on_is_refused(cache: Path) -> None:
    model = _model()
    with pytest.raises(DraftHeadError, match="answer_tokens"):
        lab.train_draft_head(model, answer_tokens=1)
    with pytest.raises(DraftHeadError, match="depth"):
        lab.train_draft_head(model, depth=1)
    with pytest.raises(DataError):
        lab.train_draft_head(model, [lab.ChoiceItem(question="?", choices=("a", "b"), answer=0)])
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = None
    plain = PolarModel.from_hf(tiny_llama(), tokenizer, ledger=None)
    with pytest.raises(DataError, match="20 tokens"):
        lab.train_draft_head(model, [lab.PromptItem(prompt="a" * 600)], answer_tokens=20)
    with pytest.raises(DataError, match="chat template"):
        lab.train_draft_head(plain)
    assert not saved_head_path(model.fingerprint).exists()


def test_the_command_says_what_it_made(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    monkeypatch.setattr("polar_sdk.cli.options.load_model", lambda *_, **__: model)
    data, out = tmp_path / "prompts.jsonl", tmp_path / "head.safetensors"
    data.write_text("".join(f'{{"prompt": "prompt {number}"}}\n' for number in range(20)))
    options = ["lab", "drafts", "--data", str(data), "--limit", "12", "--answer-tokens", "9", "--epochs", "1"]
    options += ["--out", str(out)]
    done = polar(*options)
    assert done.exit_code == 0, done.output
    assert "numbers from 99 tokens of 11 answers; of held-out answers it guesses" in done.output
    head = DraftHeadFile.load(out)
    assert not list(tmp_path.glob("*-checkpoints"))
    facts = json.loads(polar(*options, "--json").stdout)
    assert (facts["parameters"], facts["answers"], facts["out"]) == (head.parameters, 11, str(out))
    missing = polar("lab", "drafts", "--data", tmp_path / "none.jsonl")
    assert missing.exit_code == 2
    assert "none.jsonl" in missing.output
