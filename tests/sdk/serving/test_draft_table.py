"""A draft table: counted rightly, read back whole, refused where it is damaged or another model's."""

from __future__ import annotations

import copy
import json
import logging
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from typer.testing import CliRunner

from polar_sdk import PolarModel, lab
from polar_sdk.cli.main import app
from polar_sdk.errors import DataError, DraftTableDamagedError, DraftTableError, PolarError
from polar_sdk.lab.rewards.cache import RewardCache
from polar_sdk.models import load as load_module
from polar_sdk.models.load import find_draft_table, saved_table_path
from polar_sdk.serving.draft_table import CONTEXT, MAX_VOCABULARY, DraftTable, DraftTableFacts
from polar_sdk.serving.drafts import OtherAnswers, Proposal
from polar_sdk.testing import tiny_llama, tiny_tokenizer
from tests.sdk.serving.test_drafts import WideAsNarrow

if TYPE_CHECKING:
    from collections.abc import Sequence

FACTS = DraftTableFacts(model="tiny", fingerprint="f" * 64, answers=1, tokens=1, data="")
TOKENS = st.sampled_from([0, 1, 2, MAX_VOCABULARY - 1])


def counted(answers: Sequence[Sequence[int]]) -> DraftTable:
    return DraftTable.count(answers, FACTS)


@given(st.lists(st.lists(TOKENS, max_size=30), max_size=8), st.lists(TOKENS, max_size=5))
def test_it_guesses_what_followed_most_often(answers: list[list[int]], last: list[int]) -> None:
    followed: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for answer in answers:
        for length in range(1, CONTEXT + 1):
            for place in range(length, len(answer)):
                followed[tuple(answer[place - length : place])][answer[place]] += 1
    guess = counted(answers).guess(last)
    for length in range(min(CONTEXT, len(last)), 0, -1):
        seen = Counter(times for key, found in followed.items() if len(key) == length for times in found.values())
        found = followed[tuple(last[-length:])]
        times, total = max(found.values(), default=0), sum(found.values())
        chance = (times - seen[1] / max(seen[1] + 2 * seen[2], 1)) / max(total, 1)
        if chance >= 0.15:
            assert guess is not None
            assert found[guess.token] == times
            assert guess.chance == pytest.approx(chance, abs=1 / 255)
            return
    assert guess is None


def test_guesses_follow_one_another_as_far_as_that_is_likely() -> None:
    table = counted([[1, 2, 3, 4, 5]] * 9)
    assert table.following([9, 1], 3) == [(2, 1.0), (3, 1.0), (4, 1.0)]
    assert [guess.token for guess in table.following([1], 9)] == [2, 3, 4, 5]
    assert table.following([9], 3) == []
    assert table.following([], 3) == []
    assert len(counted([[1] * 40]).following([1], 99)) == 99
    assert len(counted([[1, 2], [1, 3], [2, 1], [3, 1]] * 20).following([1], 99)) == 2 * 4  # 0.5 ** 4 > 0.05


def test_what_was_seen_once_counts_less_than_its_share() -> None:
    table = counted([[1, 2], [3, 4], [5, 6], [5, 6], [7, 8], [7, 8], [7, 8]])
    discount = 2 / (2 + 2 * 1)
    for last, times in ((1, 1), (5, 2), (7, 3)):
        guess = table.guess([last])
        assert guess is not None
        assert guess.chance == pytest.approx((times - discount) / times, abs=1 / 255)


def test_it_is_proposed_beside_earlier_answers() -> None:
    others = OtherAnswers(counted([[1, 2, 3]] * 9))
    others.add("acme", [5], [1, 4])
    earlier, table = others.following("acme", [1], 2)
    assert earlier == Proposal([4], 1, "earlier")
    assert (table.tokens, table.source) == ([2, 3], "table")
    assert table.table == (1.0, 1.0)
    assert [each.source for each in others.following("globex", [1], 2)] == ["table"]


# -- the file --------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 5), max_size=40), max_size=5))
def test_what_is_read_is_what_was_written(tmp_path_factory: pytest.TempPathFactory, answers: list[list[int]]) -> None:
    path = tmp_path_factory.getbasetemp() / "table.safetensors"
    table = counted(answers)
    assert table.save(path) == path
    read = DraftTable.load(path)
    assert (read.keys, read.tokens, read.chances, read.facts) == (table.keys, table.tokens, table.chances, FACTS)
    assert read.bytes == 13 * len(read)


def test_a_table_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = counted([[1, 2, 3]] * 9).save(tmp_path / "new" / "table.safetensors")

    def full(file: Path, data: bytes) -> None:
        with file.open("wb") as half:
            half.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        counted([[4, 5, 6]] * 9).save(path)
    monkeypatch.undo()
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert DraftTable.load(path).guess([1, 2]) is not None


def _write(path: Path, facts: str | None, **columns: Any) -> None:
    table = {"keys": [3, 4], "tokens": [1, 2], "chances": [9, 9]} | columns
    types: dict[str, Any] = {"keys": np.uint64, "tokens": np.uint32, "chances": np.uint8}
    arrays = {name: np.array(table[name], dtype=types[name]) for name in types if table[name] is not None}
    save_file(arrays, path, metadata=None if facts is None else {"facts": facts})


@pytest.mark.parametrize(
    ("facts", "columns", "what"),
    [
        (None, {}, "JSON"),
        ("{}", {}, "facts: model: Field required"),
        (FACTS.model_copy(update={"format": "polar-drafts-9"}).model_dump_json(), {}, "'polar-drafts-9', not 'polar"),
        (FACTS.model_dump_json(), {"keys": None}, "keys"),
        (FACTS.model_dump_json(), {"keys": [4, 3]}, "columns do not form a table"),
        (FACTS.model_dump_json(), {"keys": [3, 3]}, "columns do not form a table"),
        (FACTS.model_dump_json(), {"tokens": [1]}, "columns do not form a table"),
    ],
)
def test_a_damaged_table_is_one_clear_line(tmp_path: Path, facts: str | None, columns: Any, what: str) -> None:
    path = tmp_path / "table.safetensors"
    _write(path, facts, **columns)
    with pytest.raises(DraftTableDamagedError) as error:
        DraftTable.load(path)
    message = str(error.value)
    assert what in message
    assert str(path) in message
    assert "`polar drafts`" in message
    assert "\n" not in message


def test_a_file_that_is_cut_short_or_missing_is_damaged(tmp_path: Path) -> None:
    path = counted([[1, 2, 3]] * 9).save(tmp_path / "table.safetensors")
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DraftTableDamagedError, match="is damaged"):
            DraftTable.load(path)
    path.unlink()
    with pytest.raises(DraftTableDamagedError, match="is damaged"):
        DraftTable.load(path)


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path))
    return tmp_path


def _model(**options: Any) -> PolarModel:
    network = tiny_llama(tie_word_embeddings=True, max_position_embeddings=512)
    return PolarModel.from_hf(network, tiny_tokenizer(), ledger=None, compile=False, **options)


def _facts(model: PolarModel) -> DraftTableFacts:
    return FACTS.model_copy(update={"fingerprint": model.fingerprint})


def test_the_first_answer_is_drafted_and_the_same(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    plain = model.generate("Hello", max_tokens=40, speculate="off")
    without = model.generate("Hello", max_tokens=40, speculate="auto", tenant="without")
    DraftTable.count([plain.token_ids] * 9, _facts(model)).save(saved_table_path(model.fingerprint))
    fresh = _model()
    monkeypatch.setattr(fresh.scheduler._drafting, "costs", WideAsNarrow())
    drafted = fresh.generate("Hello", max_tokens=40, speculate="auto")
    assert drafted.token_ids == plain.token_ids
    assert drafted.usage.flops.total == plain.usage.flops.total
    assert drafted.usage.tokens.accepted > 25 + without.usage.tokens.accepted
    sampled = fresh.generate("Hello", max_tokens=40, temperature=1.0, seed=5, speculate="auto")
    assert sampled.token_ids == model.generate("Hello", max_tokens=40, temperature=1.0, seed=5).token_ids


def test_what_cannot_be_used_is_passed_over_with_a_warning(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = _model()
    path = saved_table_path(model.fingerprint)
    for table, what in (
        (counted([[1, 2, 3]] * 9), "made for model tiny (ffffffffffff…), but this model is"),
        (DraftTable.count([[1, 2, 999]] * 9, _facts(model)), "proposes token 999, but ids of this model are 0 to"),
    ):
        table.save(path)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert find_draft_table(model.fingerprint, model.decoder.vocab) is None
        assert what in caplog.text
    path.write_bytes(b"nothing")
    with caplog.at_level(logging.WARNING):
        answer = _model().generate("Hello", max_tokens=5, speculate="auto")
    assert "is damaged" in caplog.text
    assert answer.token_ids == model.generate("Hello", max_tokens=5).token_ids


# -- how it is made --------------------------------------------------------------------------------------------------


def test_it_is_made_from_answers_to_prompts(cache: Path) -> None:
    model, seen = _model(), list[tuple[str, int, int]]()
    items: list[lab.Item] = [lab.PromptItem(prompt=f"prompt {number}") for number in range(12)]
    items += [lab.AnswerItem(prompt="prompt 3", answer="x"), lab.ChoiceItem(question="?", choices=("a", "b"), answer=0)]
    table = lab.make_draft_table(model, items, on_progress=lambda *step: seen.append(step), answer_tokens=20)
    assert (table.facts.answers, table.facts.tokens) == (12, 240)
    assert table.facts.fingerprint == model.fingerprint
    assert table.facts.right is not None
    assert seen == [("identity's answers", 12, 12)]
    lab.make_draft_table(model, items, out=cache / "again.safetensors", answer_tokens=20)
    assert saved_table_path(model.fingerprint).read_bytes() == (cache / "again.safetensors").read_bytes()
    answer = model.generate("prompt 3", max_tokens=20)
    tokens = [*answer.prompt_ids[-CONTEXT:], *answer.token_ids]
    expected: Counter[int] = Counter()
    for number in range(12):
        other = model.generate(f"prompt {number}", max_tokens=20)
        row = [*other.prompt_ids[-CONTEXT:], *other.token_ids]
        expected.update(row[place] for place in range(3, len(row)) if row[place - 3 : place] == tokens[:3])
    guess = table.guess(tokens[:3])
    assert guess is not None
    assert expected[guess.token] == max(expected.values())


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
    table = lab.make_draft_table(model, cache=kept, questions=140, answer_tokens=8, seed=3)
    starts, options = asked[0]
    whole = model.prompt_tokens("Hello there")
    assert whole[: len(starts[0])] == starts[0]
    assert model.decode(whole[len(starts[0]) :]).startswith("Hello there")
    assert [len(prompts) for prompts, _ in asked] == [128, 12]
    assert [own["seed"] for own in asked[1][1]["each"]] == list(range(131, 143))
    assert options["temperature"] == 1.0
    assert 0 < len(answered) == len(set(answered)) == table.facts.answers < 140  # some had no end
    questions, answered[:], asked[:] = set(answered), [], []
    more = lab.make_draft_table(model, cache=kept, questions=150, answer_tokens=8, seed=3)
    assert [len(prompts) for prompts, _ in asked] == [10]
    assert not questions & set(answered)
    assert more.facts.answers == table.facts.answers + len(answered)


def test_what_was_interrupted_goes_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = _model(), RewardCache()
    answer, calls = model.greedy_answers, list[int]()

    def interrupted(prompts: Any, **options: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(prompts, **options)

    monkeypatch.setattr(model, "greedy_answers", interrupted)
    items = [lab.PromptItem(prompt=f"prompt {number}") for number in range(150)]
    with pytest.raises(KeyboardInterrupt):
        lab.make_draft_table(model, items, cache=kept, answer_tokens=4)
    assert not saved_table_path(model.fingerprint).exists()
    lab.make_draft_table(model, items, cache=kept, answer_tokens=4)
    assert calls == [128, 22, 22]
    resumed = saved_table_path(model.fingerprint).read_bytes()
    lab.make_draft_table(model, items, answer_tokens=4)
    assert saved_table_path(model.fingerprint).read_bytes() == resumed


def test_a_place_that_cannot_be_written_is_named_before_anything_runs(cache: Path) -> None:
    model = _model()
    (cache / "file").write_text("")
    for out, what in (
        (cache / "file" / "table", "Not a directory|File exists"),
        (cache, "it is a folder; name a file"),
    ):
        with pytest.raises(DraftTableError, match=f"{out}' cannot be written: ({what})"):
            lab.make_draft_table(
                model, [lab.PromptItem(prompt="a")], out=out, on_progress=lambda *_: pytest.fail("ran")
            )


def test_what_it_cannot_be_made_from_is_refused(cache: Path) -> None:
    model = _model()
    with pytest.raises(DraftTableError, match=r"option answer_tokens: Input should be greater than or equal to 2"):
        lab.make_draft_table(model, answer_tokens=1)
    with pytest.raises(DataError, match="choice questions alone"):
        lab.make_draft_table(model, [lab.ChoiceItem(question="?", choices=("a", "b"), answer=0)])
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = None
    plain = PolarModel.from_hf(tiny_llama(), tokenizer, ledger=None, compile=False)
    with pytest.raises(DataError, match="no prompt leaves room for an answer of 20 tokens"):
        lab.make_draft_table(model, [lab.PromptItem(prompt="a" * 600)], answer_tokens=20)
    with pytest.raises(DataError, match="has no chat template by which it could ask itself questions"):
        lab.make_draft_table(plain)
    assert not saved_table_path(model.fingerprint).exists()


def test_a_vocabulary_may_be_too_large(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polar_sdk.lab.drafting.MAX_VOCABULARY", 100)
    with pytest.raises(DraftTableError, match=r"more than the 100 of a draft table"):
        lab.make_draft_table(_model())


def test_the_command_says_what_it_made(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    monkeypatch.setattr("polar_sdk.cli.options.load_model", lambda *_, **__: model)
    data, out = tmp_path / "prompts.jsonl", tmp_path / "table.safetensors"
    data.write_text("".join(f'{{"prompt": "prompt {number}"}}\n' for number in range(20)))
    options = ["drafts", "--data", str(data), "--limit", "12", "--answer-tokens", "9", "--out", str(out)]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    assert "entries from 108 tokens of 12 answers" in done.output
    table = DraftTable.load(out)
    facts = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    assert (facts["entries"], facts["answers"], facts["out"]) == (len(table), 12, str(out))
    missing = CliRunner().invoke(app, ["drafts", "--data", str(tmp_path / "none.jsonl")])
    assert missing.exit_code == 2
    assert "none.jsonl" in missing.output


def test_errors_are_of_the_packages_tree() -> None:
    assert issubclass(DraftTableError, PolarError)
    assert load_module.find_draft_table("0" * 64, 10) is None


@pytest.mark.model
def test_the_default_model_has_one() -> None:
    model = PolarModel.from_pretrained(ledger=None)
    table = find_draft_table(model.fingerprint, model.decoder.vocab)
    assert table is not None
    assert table.facts.fingerprint == model.fingerprint
    assert table.facts.right is not None
    assert table.facts.right > 0.3
