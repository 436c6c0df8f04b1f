"""Bridges: the fit is the least-squares one and beats a plain skip on prompts held out; how they are kept and used."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from polar_sdk import PolarModel, Policy, Program, lab
from polar_sdk.cli.main import app
from polar_sdk.engine.bridge import Bridge
from polar_sdk.engine.forward import next_logits
from polar_sdk.engine.hashes import hash_bridges
from polar_sdk.engine.row import Row
from polar_sdk.errors import BridgeDamagedError, BridgeError, BridgeModelError, DataError, MissingBridgeError
from polar_sdk.lab.healing.bridge_fit import BridgeSums, make_packs, trainable_copy
from polar_sdk.lab.healing.heal import Healer, HealOptions, parse_segments
from polar_sdk.lab.healing.loss import Reference, choice_scores, loss_of, slots_of
from polar_sdk.lab.items import ChoiceItem, Item, PromptItem, builtin_items
from polar_sdk.lab.rewards.cache import RewardCache
from polar_sdk.lab.rewards.tasks import make_tasks
from polar_sdk.router.bridge_set import BridgeSet
from polar_sdk.testing import tiny_llama, tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DEPTH = 6


def make_model(seed: int = 0) -> PolarModel:
    return tiny_model(policy=Policy.permissive(), seed=seed)


@pytest.fixture
def model() -> PolarModel:
    return make_model()


@pytest.fixture
def healed(mixed_items: list[Item]) -> Callable[..., BridgeSet]:
    """Fit bridges, which the model does not use yet."""

    def heal(model: PolarModel, segments: str = "1-2,4", out: Path | None = None, **options: object) -> BridgeSet:
        chosen = HealOptions(**{"answer_tokens": 6, **options})  # type: ignore[arg-type]
        return Healer(model, mixed_items, segments, options=chosen, out=out).run()

    return heal


def same(one: BridgeSet, other: BridgeSet) -> bool:
    return {segment: bridge.digest for segment, bridge in one.bridges.items()} == {
        segment: bridge.digest for segment, bridge in other.bridges.items()
    }


def test_ridge_finds_the_map_that_made_the_states() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(8, 8, generator=generator), torch.randn(8, generator=generator)
    before = torch.randn(400, 8, generator=generator) + 3
    positions = torch.arange(400) % 20
    after = before + before @ weight + bias
    after[positions == 0] = before[positions == 0] + 1000.0  # what would bend a fit that took it in
    ridge = BridgeSums(8, torch.device("cpu"))
    for part in (slice(0, 150), slice(150, 400)):  # in two packs
        ridge.add(before[part], after[part], positions[part])
    found = ridge.solve(1e-9)
    assert ridge.count == 380
    assert torch.allclose(found.weight[0], weight, atol=1e-4)
    assert torch.allclose(found.bias, bias, atol=1e-3)
    assert torch.allclose(found(before, positions), after, atol=1e-2)


def test_a_low_rank_map_is_the_best_of_its_rank_on_what_it_saw() -> None:
    """Reduced-rank regression against cutting the singular values of the weight, with inputs of unequal size."""
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(500, 8, generator=generator) * torch.tensor([9.0, 5, 1, 1, 0.3, 0.3, 0.1, 0.1])
    after = before + before @ torch.randn(8, 8, generator=generator)
    positions = torch.ones(500, dtype=torch.long)
    ridge = BridgeSums(8, torch.device("cpu"))
    ridge.add(before, after, positions)
    full, low = ridge.solve(1e-9), ridge.solve(1e-9, rank=2)
    assert (low.rank, full.rank) == (2, None)
    left, values, right = torch.linalg.svd(full.weight[0])
    cut = Bridge(((left[:, :2] * values[:2]), right[:2]), full.bias, full.first)
    errors = [float((one(before, positions) - after).square().sum()) for one in (full, low, cut)]
    assert errors[0] < 1e-2 < errors[1] < 0.9 * errors[2]


def test_bridges_come_nearer_to_the_segment_than_a_skip_on_prompts_held_out(
    model: PolarModel, healed: Callable[..., BridgeSet]
) -> None:
    made = healed(model, "1-2,4;2-4")
    assert [(record.first, record.last) for record in made.records] == [(1, 2), (4, 4), (2, 4)]
    assert all(record.error_of_skip is not None and record.error_of_skip < 0.9 for record in made.records)
    assert model.loaded.decoder.bridges == {}  # fitting leaves the model alone


def test_a_later_bridge_is_fitted_on_what_the_earlier_one_leaves(
    model: PolarModel, healed: Callable[..., BridgeSet]
) -> None:
    together, alone = healed(model, "1-2,4"), healed(model, "4")
    assert together.bridges[4, 4].digest != alone.bridges[4, 4].digest
    assert together.bridges[1, 2].digest == healed(model, "1-2").bridges[1, 2].digest


@pytest.mark.parametrize("rank", [None, 5])
def test_metered_flops_are_those_that_the_counter_counts(
    model: PolarModel, rank: int | None, healed: Callable[..., BridgeSet]
) -> None:
    model.use_bridges(healed(model, rank=rank))
    decoder, program = model.loaded.decoder, Program.parse("0 [1-2] 3 [4] 5")
    row = Row(decoder, program)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        next_logits(decoder, [row], [[1, 2, 3, 4]])
        next_logits(decoder, [row], [[5]])
    assert row.work.flops().total == counter.get_total_flops()
    assert row.work.flops().total == decoder.cost.request(program, 4, 2).total
    assert row.work.visits().prefill == (1, 0, 0, 1, 0, 1)


def test_packs_run_as_the_engine_runs(
    model: PolarModel, mixed_items: list[Item], healed: Callable[..., BridgeSet]
) -> None:
    """Hidden states that bridges are fitted on are those that a request has."""
    model.use_bridges(healed(model))
    decoder, program = model.loaded.decoder, Program.parse("0 [1-2] 3 [4] 5")
    tasks = make_tasks(model, mixed_items, RewardCache(), answer_tokens=5)
    pack = make_packs(decoder, tasks[:3], 4096)[0]
    with torch.inference_mode():
        states = pack.run(trainable_copy(decoder), pack.packed.embedded, program.steps)
        at = 0
        for task in tasks[:3]:
            tokens = [*task.question.prompt, *task.question.continuations[0]]
            at += len(tokens)
            logits = next_logits(decoder, [Row(decoder, program)], [tokens])
            assert torch.allclose(decoder.head(states[at - 1 : at]), logits, atol=1e-4)


def test_training_lowers_the_loss_on_prompts_held_out(model: PolarModel) -> None:
    options = HealOptions(distil=40, rate=1e-3, answer_tokens=6)
    made = Healer(model, builtin_items()[:100], "1-2", options=options).run()
    assert made.training["kept_training"]
    assert made.training["loss_trained"] < 0.98 * made.training["loss_closed_form"]
    assert len(made.training["losses"]) == 40
    assert all(not weight.requires_grad for layer in model.loaded.decoder.layers for weight in _tensors(layer))


def _tensors(layer: dict[str, object]) -> list[torch.Tensor]:
    return [value for value in layer.values() if isinstance(value, torch.Tensor)]


def test_training_that_does_harm_is_not_kept(model: PolarModel, healed: Callable[..., BridgeSet]) -> None:
    made = healed(model, distil=4, rate=50.0)
    assert not made.training["kept_training"]
    assert same(made, healed(model))


def test_labels_change_the_training_only_where_they_are_asked_for(model: PolarModel, mixed_items: list[Item]) -> None:
    turned: list[Item] = [
        item.model_copy(update={"answer": (item.answer + 1) % 3}) if isinstance(item, ChoiceItem) else item
        for item in mixed_items
    ]

    def train(items: list[Item], labels: float) -> list[float]:
        options = HealOptions(distil=3, labels=labels, answer_tokens=4)
        losses: list[float] = Healer(model, items, "2", options=options).run().training["losses"]
        return losses

    assert train(mixed_items, 0.0) == train(turned, 0.0)
    assert train(mixed_items, 2.0) != train(turned, 2.0)


def test_the_loss_is_zero_for_identity_and_its_terms_add_up(model: PolarModel, mixed_items: list[Item]) -> None:
    tasks = make_tasks(model, mixed_items[-3:], RewardCache())
    pack = make_packs(model.loaded.decoder, tasks, 4096)[0]
    slots = slots_of(tasks, torch.device("cpu"))
    assert slots is not None
    identity = torch.randn(len(pack.targets), 260, generator=torch.Generator().manual_seed(2))
    ours = identity + torch.randn(len(pack.targets), 260, generator=torch.Generator().manual_seed(3))
    full = Reference(torch.arange(len(identity)), identity, choice_scores(identity, pack.targets, slots))
    assert float(loss_of(identity, full, pack.targets, slots, distil=1, labels=0)) == pytest.approx(0, abs=1e-6)
    divergence = float(loss_of(ours, full, pack.targets, None, distil=1, labels=1))
    halves = [float(loss_of(ours, full, pack.targets, slots, distil=weight, labels=0)) for weight in (0, 1, 2)]
    assert halves[0] == pytest.approx(divergence)
    assert halves[2] - halves[1] == pytest.approx(halves[1] - halves[0], rel=1e-4)
    scores = _scores_by_hand(ours, pack.targets, tasks)
    right = [task.item.answer for task in tasks if isinstance(task.item, ChoiceItem)]
    wanted = torch.nn.functional.cross_entropy(torch.tensor(scores) / 0.3, torch.tensor(right))
    labelled = float(loss_of(ours, full, pack.targets, slots, distil=0, labels=1))
    assert labelled - halves[0] == pytest.approx(float(wanted), rel=1e-4)


def _scores_by_hand(logits: torch.Tensor, targets: torch.Tensor, tasks: list) -> list[list[float]]:  # type: ignore[type-arg]
    values = iter(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist())
    return [
        [sum(next(values) for _ in tail) / len(choice) for tail, choice in zip(
            task.question.continuations, task.item.choices, strict=True
        )]
        for task in tasks
    ]  # fmt: skip


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(
    model: PolarModel, tmp_path: Path, mixed_items: list[Item]
) -> None:
    class Stop(KeyboardInterrupt):
        pass

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "training bridges" and done == 7:
            raise Stop

    options = HealOptions(distil=12, answer_tokens=6, drop=0.5)
    whole = Healer(model, mixed_items, "1-2,4", options=options, out=tmp_path / "whole").run()
    with pytest.raises(Stop):
        Healer(model, mixed_items, "1-2,4", options=options, out=tmp_path / "cut", on_progress=interrupt).run()
    assert (tmp_path / "cut" / "checkpoint.safetensors").is_file()
    with pytest.raises(BridgeError, match="other data, segments or settings"):
        Healer(
            model,
            mixed_items,
            "1-2,4",
            options=HealOptions(distil=13, answer_tokens=6, resume=True),
            out=tmp_path / "cut",
        ).run()
    steps = []
    resumed = HealOptions(distil=12, answer_tokens=6, drop=0.5, resume=True)
    again = Healer(
        model,
        mixed_items,
        "1-2,4",
        options=resumed,
        out=tmp_path / "cut",
        on_progress=lambda stage, done, _: steps.append((stage, done)),
    ).run()
    assert [done for stage, done in steps if stage == "training bridges"] == [8, 9, 10, 11, 12]
    assert again.training["losses"] == whole.training["losses"]
    assert same(again, whole)
    assert not (tmp_path / "cut" / "checkpoint.safetensors").exists()


def test_saved_bridges_read_back_and_serve(model: PolarModel, tmp_path: Path, healed: Callable[..., BridgeSet]) -> None:
    made = healed(model, out=tmp_path / "b", rank=4)
    found = BridgeSet.load(tmp_path / "b")
    assert same(found, made)
    assert (found.records, found.data, found.training) == (made.records, made.data, made.training)
    assert found.bytes == made.bytes == sum(2 * 48 * 4 + 48 + 48 for _ in range(2)) * 4
    program = "0 [1-2] 3 [4] 5"
    other = tiny_model(policy=Policy.permissive(), bridges=tmp_path / "b")
    with pytest.raises(MissingBridgeError, match="no bridge over layers 1-2"):
        model.generate("hello", program=program)
    model.use_bridges(tmp_path / "b")
    answers = [one.generate("hello", program=program, max_tokens=5) for one in (model, other)]
    assert answers[0].token_ids == answers[1].token_ids
    assert (
        answers[0].usage.flops
        == answers[1].usage.flops
        == model.cost(program, prompt=answers[0].usage.tokens.input, output=5)
    )


def test_the_method_of_the_model_uses_what_it_fits(model: PolarModel, mixed_items: list[Item]) -> None:
    made = lab.heal(model, mixed_items, "1-2", answer_tokens=4)
    assert set(model.loaded.decoder.bridges) == set(made.bridges) == {(1, 2)}
    assert model.generate("x", program="0 [1-2] 3-5", max_tokens=1).usage.program == "0 [1-2] 3-5"


def test_training_goes_on_from_bridges_at_hand(
    model: PolarModel, tmp_path: Path, healed: Callable[..., BridgeSet]
) -> None:
    low = healed(model, "1-2", out=tmp_path / "b", rank=4)
    more = healed(model, "1-2,4", start=str(tmp_path / "b"))
    assert more.bridges[1, 2].digest == low.bridges[1, 2].digest
    assert [record.kind for record in more.records] == ["rank 4", "full rank"]


def test_kept_starts_of_prompts_are_not_those_of_other_bridges(
    model: PolarModel, healed: Callable[..., BridgeSet]
) -> None:
    """The same program with another map gives other keys and values; pages of the old ones must not be lent."""
    program, prompt = "0 [1-2] 3-5", "a prompt of more than one page of keys and values, " * 4
    model.use_bridges(healed(model, "1-2"))
    model.generate(prompt, program=program, max_tokens=2)
    assert model.generate(prompt, program=program, max_tokens=2).usage.tokens.cached > 0
    model.use_bridges(healed(model, "1-2", rank=1))
    again = model.generate(prompt, program=program, max_tokens=2)
    assert again.usage.tokens.cached == 0
    assert hash_bridges(model.loaded.decoder, [Program.parse(program)])
    assert hash_bridges(model.loaded.decoder, [Program.identity(DEPTH)]) == ""


def test_bridges_of_another_model_and_damaged_ones(
    model: PolarModel, tmp_path: Path, healed: Callable[..., BridgeSet]
) -> None:
    folder = tmp_path / "b"
    healed(model, "1-2", out=folder)
    with pytest.raises(BridgeModelError, match="fitted for model"):
        make_model(seed=1).use_bridges(folder)
    good = (folder / "bridges.safetensors").read_bytes()
    (folder / "bridges.safetensors").write_bytes(good[:-4] + b"\x00\x01\x02\x03")
    with pytest.raises(BridgeDamagedError, match="is not the file that"):
        model.use_bridges(folder)
    (folder / "bridges.safetensors").write_bytes(good)
    facts = json.loads((folder / "bridges.json").read_text())
    for change, says in (
        ({"format": "polar-bridges-9"}, "format 'polar-bridges-9'"),
        ({"segments": "all"}, "segments"),
        ({"segments": [{**facts["segments"][0], "first": 0}]}, r"0-2\.weight\.0"),
    ):
        (folder / "bridges.json").write_text(json.dumps(facts | change))
        with pytest.raises(BridgeDamagedError, match=says):
            model.use_bridges(folder)
    (folder / "bridges.json").unlink()
    with pytest.raises(BridgeDamagedError, match="No such file"):
        model.use_bridges(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no segment"),
        ("1-x", "does not parse"),
        ("4-2", "does not fit"),
        ("3-6", "between 0 and 5"),
        ("1-3,3-4", "overlap"),
        ("0-5", "all 6 layers"),
    ],
)
def test_segments_that_make_no_sense(text: str, says: str) -> None:
    with pytest.raises(BridgeError, match=says):
        parse_segments(text, DEPTH)


def test_segments_in_groups() -> None:
    assert parse_segments("4, [1-2];2-4;", DEPTH) == [[(1, 2), (4, 4)], [(2, 4)]]


@pytest.mark.parametrize(
    "wrong",
    [{"ridge": 0.0}, {"rank": 0}, {"distil": -1}, {"drop": 1.0}, {"labels": -1.0}, {"rate": 0.0}, {"answer_tokens": 0}],
)
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(BridgeError, match=f"{next(iter(wrong))}="):
        HealOptions(**wrong)  # type: ignore[arg-type]


def test_data_that_cannot_be_fitted_on(model: PolarModel, mixed_items: list[Item]) -> None:
    with pytest.raises(DataError, match="no prompt"):
        lab.heal(model, [], "1-2")
    with pytest.raises(DataError, match="copies of one"):
        lab.heal(model, [PromptItem(prompt="a"), PromptItem(prompt="A")], "1-2")
    integers = PolarModel.from_hf(tiny_llama(), tiny_tokenizer(), precision="int8", ledger=None)
    with pytest.raises(BridgeError, match="int8 weights, which have no derivatives"):
        lab.heal(integers, mixed_items, "1-2", distil=1)


def test_ctrl_c_leaves_a_checkpoint_that_the_command_goes_on_from(
    model: PolarModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixed_items: list[Item]
) -> None:
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("polar_sdk.cli.options.load_model", lambda *_, **__: model)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(item.model_dump_json() for item in mixed_items))
    command = [
        "lab",
        "heal",
        "--data",
        str(data),
        "--segments",
        "1-2",
        "--distil",
        "5",
        "--answer-tokens",
        "4",
        "--out",
    ]
    calls = 0

    def interrupted(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return loss_of(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("polar_sdk.lab.healing.bridge_training.loss_of", interrupted)
        cut = CliRunner().invoke(app, [*command, str(tmp_path / "cut")])
    assert (cut.exit_code, "--resume continues" in cut.output) == (130, True)
    assert not (tmp_path / "cut" / "bridges.json").exists()
    again = CliRunner().invoke(app, [*command, str(tmp_path / "cut"), "--resume"])
    whole = CliRunner().invoke(app, [*command, str(tmp_path / "whole")])
    assert (again.exit_code, whole.exit_code) == (0, 0), again.output
    assert same(BridgeSet.load(tmp_path / "cut"), BridgeSet.load(tmp_path / "whole"))


def test_the_command_fits_says_the_size_and_resumes(
    model: PolarModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixed_items: list[Item]
) -> None:
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("polar_sdk.cli.options.load_model", lambda *_, **__: model)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(item.model_dump_json() for item in mixed_items))
    command = [
        "lab",
        "heal",
        "--data",
        str(data),
        "--segments",
        "1-2,4",
        "--out",
        str(tmp_path / "b"),
        "--answer-tokens",
        "4",
    ]
    result = CliRunner().invoke(app, [*command, "--distil", "2"])
    assert result.exit_code == 0, result.output
    assert "MB)" in result.output
    assert set(BridgeSet.load(tmp_path / "b").bridges) == {(1, 2), (4, 4)}
    told = CliRunner().invoke(app, [*command, "--distil", "2", "--resume", "--json"])
    assert json.loads(told.stdout)["bytes"] == BridgeSet.load(tmp_path / "b").bytes
    wrong = CliRunner().invoke(app, [*command[:4], "--segments", "9-12", "--out", str(tmp_path / "c")])
    assert wrong.exit_code == 2
    assert "does not fit" in wrong.output
