"""The scan on a tiny model: what it measures is checked against doing the same by hand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from polar_sdk import Policy, Program
from polar_sdk.engine.forward import next_logits
from polar_sdk.engine.pack import Question, packs
from polar_sdk.engine.row import Row
from polar_sdk.errors import DataError
from polar_sdk.lab.items import ChoiceItem, PromptItem
from polar_sdk.lab.layer_scan import Scanner, policy_of
from polar_sdk.testing import tiny_model
from tests.sdk.command import polar

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from polar_sdk.model import PolarModel

DEPTH = 6
PROMPTS = [PromptItem(prompt=text) for text in ("hello", "what is this", "count to ten")]
CHOICES = [
    ChoiceItem(question="Which is a colour?", choices=("red", "seven", "run"), answer=0),
    ChoiceItem(question="Two and two?", choices=("three", "four"), answer=1),
]


@pytest.fixture(scope="module")
def model() -> PolarModel:
    return tiny_model(policy=Policy(protected=(0, -1)))


def next_token(model: PolarModel, program: Program, tokens: Sequence[int]) -> int:
    decoder = model.loaded.decoder
    with torch.inference_mode():
        return int(next_logits(decoder, [Row(decoder, program)], [tokens])[0].argmax())


def test_agreement_is_counted_token_by_token(model: PolarModel) -> None:
    program = Program.parse("0-1 3-5")
    score = Scanner(model, PROMPTS, answer_tokens=6).measure([program])[program]
    same = []
    for item in PROMPTS:
        done = model.generate(item.prompt, program=Program.identity(DEPTH), max_tokens=6)
        prompt = model.prompt_tokens(item.prompt)
        for at, token in enumerate(done.token_ids):  # the program's own choice after identity's start
            same.append(next_token(model, program, [*prompt, *done.token_ids[:at]]) == token)
    assert score.agreement == sum(same) / len(same)


def test_identity_agrees_with_itself_and_loses_nothing(model: PolarModel) -> None:
    identity = Program.identity(DEPTH)
    score = Scanner(model, [*PROMPTS, *CHOICES], answer_tokens=8).measure([identity])[identity]
    assert (score.agreement, score.same_choice, score.fidelity) == (1.0, 1.0, 1.0)
    assert score.excess_nats == pytest.approx(0, abs=1e-5)
    assert score.flops_ratio == 1.0


def test_accuracy_is_the_share_of_right_choices(model: PolarModel) -> None:
    program = Program.parse("0-3 5")
    score = Scanner(model, CHOICES).measure([program])[program]
    right = 0
    for item in CHOICES:
        values = model.score(f"Question: {item.question}\nAnswer:", [f" {c}" for c in item.choices], program=program)
        per_character = [value / len(choice) for value, choice in zip(values, item.choices, strict=True)]
        right += per_character.index(max(per_character)) == item.answer
    assert score.accuracy == right / len(CHOICES)
    assert score.agreement is None


def test_packs_keep_order_and_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polar_sdk.engine.pack.MAX_PACK_TOKENS", 10)
    questions = [Question((0,) * size, ((1,),)) for size in (3, 4, 20, 1, 1, 1, 6)]
    found = list(packs(questions))
    assert [question for pack in found for question in pack] == questions
    assert all(len(pack) == 1 or sum(q.tokens for q in pack) <= 10 for pack in found)


def test_a_scan_covers_every_block_and_never_a_protected_layer(model: PolarModel) -> None:
    report = Scanner(model, PROMPTS, answer_tokens=4).scan((1, 2), removals=2)
    assert [score.program.skips(DEPTH) for score in report.skips] == [
        (1,), (2,), (3,), (4,), (1, 2), (2, 3), (3, 4),
    ]  # fmt: skip
    assert [score.program.visits(DEPTH).index(2) for score in report.loops] == [1, 2, 3, 4]
    assert [len(score.program.skips(DEPTH)) for score in report.path] == [1, 2]
    least = min(report.skips[:4], key=lambda score: score.excess_nats or 0)
    assert report.path[0].program == least.program
    assert set(report.path[0].program.skips(DEPTH)) < set(report.path[1].program.skips(DEPTH))


def test_picks_become_a_policy_that_serves(model: PolarModel, tmp_path: Path) -> None:
    report = Scanner(model, PROMPTS, answer_tokens=4).scan((1,), loops=False, removals=3)
    assert report.cheapest(1.0).fidelity == 1.0
    picks = {"economy": report.cheapest(0.0), "standard": report.path[0]}
    assert picks["economy"] == report.path[-1]
    policy_of(report, picks).save(tmp_path / "policy.json")
    served = tiny_model(policy=tmp_path / "policy.json")
    usage = served.generate("x", compute="economy", max_tokens=1).usage
    assert (usage.tier, usage.program) == ("economy", report.path[-1].program.text)


def test_an_empty_set_is_an_error(model: PolarModel) -> None:
    with pytest.raises(DataError):
        Scanner(model, [])


@pytest.mark.model
def test_the_command_scans_the_real_model_and_saves_what_it_was_told_to(tmp_path: Path) -> None:
    """A small scan: one prompt, one block length, one removal; the file holds what standard output says."""
    out = tmp_path / "scan.json"
    arguments = ["lab", "scan", "--limit", "1", "--lengths", "9", "--no-loops", "--removals", "0", "--json"]
    result = polar(*arguments, "--out", out)
    assert result.exit_code == 0, result.output
    facts, saved = json.loads(result.stdout), json.loads(out.read_text())
    assert facts["skips"] == saved["skips"]
    assert len(facts["skips"]) == 19  # starts 2 to 20 of nine layers among the 27 that are not protected
    assert all(score["flops_ratio"] < 0.8 and score["agreement"] < 1 for score in facts["skips"])
    assert facts["picks"]["economy"]["program"] == facts["identity"]["program"]  # nothing else is on the path
    assert facts["saved"] is None
