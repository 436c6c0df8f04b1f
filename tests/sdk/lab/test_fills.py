"""Fills: what the closed form finds, how maps are stored and refused, and what training gains."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from polar_sdk import PolarModel, Policy, Program, lab
from polar_sdk.cli.main import app
from polar_sdk.engine.scoring import score_programs, states_after
from polar_sdk.errors import FillDamagedError, FillError, FillModelError
from polar_sdk.lab.healing.fill_fit import candidates, parse_fills
from polar_sdk.lab.healing.fill_healer import FillHealer, FillOptions
from polar_sdk.lab.items import ChoiceItem, Item, PromptItem
from polar_sdk.lab.rewards.cache import RewardCache
from polar_sdk.lab.rewards.measure import Measurer
from polar_sdk.lab.rewards.tasks import make_tasks
from polar_sdk.router.fill_set import FillSet, stored
from polar_sdk.testing import tiny_llama, tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def model() -> PolarModel:
    return tiny_model(policy=Policy.permissive())


@pytest.fixture(scope="module")
def texts() -> list[Item]:
    words = "apples pears boats trains clouds rivers stones birds maps songs lamps doors".split()  # noqa: SIM905
    return [PromptItem(prompt=f"number {place}: tell me of {word} and {words[-place % 12]}") for place, word in
            enumerate(words * 3)]  # fmt: skip


@pytest.fixture
def fitted(texts: list[Item]) -> Callable[..., FillSet]:
    """Fit fills, which the model does not use yet."""

    def fit(model: PolarModel, segments: str = "2,4", out: Path | None = None, **options: object) -> FillSet:
        chosen = FillOptions(**{"answer_tokens": 6, **options})  # type: ignore[arg-type]
        return FillHealer(model, texts, segments, out, options=chosen).run()

    return fit


def digests(fills: FillSet) -> dict[tuple[int, int], str]:
    return {segment: fill.digest for segment, fill in fills.fills.items()}


def test_what_fills_spare_of_a_choice_question_is_what_is_not_executed(fitted: Callable[..., FillSet]) -> None:
    """Attention is counted per question, and runs in blocks of several: hence not to the FLOP."""
    model = tiny_model(policy=Policy.permissive(), compile=False)
    model.use_fills(fitted(model, "3-5,4-5"))
    item = ChoiceItem(question="which of them is the largest of all? " * 2, choices=("red", "green"), answer=1)
    tasks = make_tasks(model, [item], RewardCache())
    programs = [Program.identity(6), Program.parse("0-3 (4-5)"), Program.parse("0-2 (3-5:4)")]
    rewards = Measurer(model, RewardCache()).rewards(tasks, programs)
    counted = []
    for program in programs:
        with FlopCounterMode(display=False) as counter:
            score_programs(model.decoder, [tasks[0].question], [program])
        counted.append(counter.get_total_flops())
    told = [int(rewards[program].flops[0]) for program in programs]
    assert told[0] > told[1] > told[2]
    assert told == [pytest.approx(flops, rel=0.1) for flops in counted]
    assert [one / told[0] for one in told] == [pytest.approx(flops / counted[0], rel=0.03) for flops in counted]


def test_the_first_layer_of_a_segment_is_found_exactly_and_later_ones_nearly(
    model: PolarModel, fitted: Callable[..., FillSet]
) -> None:
    """Keys and values of a layer are a linear map of its own normalised input."""
    made = fitted(model, "3-3,3-5,2", storage="float16", ridge=1e-7)
    missed = {(record.first, record.last): record.unexplained for record in made.records}
    assert missed[3, 3] is not None
    assert missed[3, 5] is not None
    assert missed[2, 5] is not None
    assert missed[3, 3] < 1e-3 < missed[3, 5] < 1
    assert missed[3, 5] < missed[2, 5] < 1
    assert model.decoder.fills == {}  # fitting leaves the model alone


def test_a_carry_brings_states_near_those_after_the_segment(
    model: PolarModel, texts: list[Item], fitted: Callable[..., FillSet]
) -> None:
    """Where layers follow the segment; a program of the map is nearer to full depth than one whose states pass."""
    made = fitted(model, "2-3,2", storage="float16")
    carried, last = made.fills[2, 3], made.fills[2, 5]
    assert [len(fill.carry) for fill in (carried, last)] == [2, 0]
    width = model.decoder.family.hidden
    assert [tuple(tensor.shape) for tensor in carried.carry] == [(width, width), (width,)]
    written = 2 * (2 * width * 2 * model.decoder.family.kv_heads * model.decoder.family.head_dim)
    assert made.records[0].flops_per_token == carried.flops == written + 2 * width * width
    tokens = [tuple(model.encode(item.prompt)) for item in texts if isinstance(item, PromptItem)]
    identity, program = Program.identity(6), Program.parse("0-1 (2-3) 4-5")
    wanted = [states[-1] for states in states_after(model.decoder, tokens, identity.steps)]
    errors = []
    for fill in (carried, replace(carried, carry=())):
        model.decoder.set_fills({(2, 3): fill.to(model.decoder.dtype, model.decoder.device)})
        found = [states[-1] for states in states_after(model.decoder, tokens, program.steps)]
        errors.append(sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True)))
    assert errors[0] < 0.9 * errors[1]


def test_segments_that_one_program_fills_are_apart_and_train_together(
    model: PolarModel, tmp_path: Path, fitted: Callable[..., FillSet]
) -> None:
    assert parse_fills("4, 4+1-2 ,(1-2)+(4-5)", 6) == [((4, 5),), ((1, 2), (4, 5))]
    for text in ("1-2+3", "1-3+2", "3+3"):
        with pytest.raises(FillError, match="a layer must run between"):
            parse_fills(text, 6)
    made = fitted(model, "5,1-2+4", out=tmp_path / "fills", storage="float16", distil=24, rate=5e-4)
    assert list(made.fills) == [(5, 5), (1, 2), (4, 5)]
    rows = {row["program"]: row for row in made.training["held_out"]}
    assert list(rows) == ["0-4 (5:16)", "0 (1-2:16) 3 (4-5:16)"]
    closed = digests(fitted(model, "5,1-2+4", storage="float16"))
    row = rows["0 (1-2:16) 3 (4-5:16)"]
    for segment in ((1, 2), (4, 5)):
        assert (digests(made)[segment] == closed[segment]) == (row["trained"] >= row["closed_form"])
    assert digests(FillSet.load(tmp_path / "fills")) == digests(made)


def test_maps_of_lower_rank_miss_more(model: PolarModel, fitted: Callable[..., FillSet]) -> None:
    missed = [fitted(model, "3", rank=rank).records[0] for rank in (2, 12, None)]
    shares = [record.unexplained for record in missed if record.unexplained is not None]
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) == 3
    assert [record.kind for record in missed] == ["rank 2", "rank 12", "full rank"]
    assert missed[0].flops_per_token < missed[2].flops_per_token


def test_hidden_units_miss_less_and_train_on(
    model: PolarModel, tmp_path: Path, texts: list[Item], fitted: Callable[..., FillSet]
) -> None:
    missed = [fitted(model, "2", units=units, storage="float16").records[0] for units in (0, 24)]
    assert [record.kind for record in missed] == ["full rank", "full rank, 24 units"]
    assert missed[1].flops_per_token > missed[0].flops_per_token
    assert missed[0].unexplained is not None
    assert missed[1].unexplained is not None
    assert missed[1].unexplained < missed[0].unexplained
    options = FillOptions(answer_tokens=6, distil=24, rate=5e-4, storage="float16", units=24)
    trained = FillHealer(model, texts, "2", tmp_path / "trained", options=options).run()
    assert trained.training["losses"][-1] < 0.9 * trained.training["losses"][0]
    drawn, learned = fitted(model, "2", units=24, storage="float16").fills[2, 5], trained.fills[2, 5]
    if trained.training["held_out"][0]["trained"] < trained.training["held_out"][0]["closed_form"]:
        assert not torch.equal(drawn.hidden[0], learned.hidden[0])  # the units learn, too
    other = fitted(model, "2", units=24, storage="float16", seed=1).fills[2, 5]
    assert not torch.equal(drawn.hidden[0], other.hidden[0])


@pytest.mark.parametrize("units", [0, 8])
@pytest.mark.parametrize("storage", ["int8", "float16"])
def test_a_fill_is_the_same_before_it_was_stored_and_after(
    storage: str, units: int, model: PolarModel, tmp_path: Path, fitted: Callable[..., FillSet]
) -> None:
    made = fitted(model, "2,4", out=tmp_path / "fills", storage=storage, units=units)
    read = FillSet.load(tmp_path / "fills")
    assert digests(read) == digests(made)
    assert read.records == made.records
    model.use_fills(tmp_path / "fills")
    assert {segment: fill.digest for segment, fill in model.decoder.fills.items()} == digests(made)
    assert {fill.units for fill in read.fills.values()} == {units}
    alone = read.only({(4, 5)})
    alone.save(tmp_path / "alone")
    assert digests(FillSet.load(tmp_path / "alone")) == {(4, 5): digests(made)[4, 5]}


def test_int8_is_within_half_a_step_of_each_output(model: PolarModel, fitted: Callable[..., FillSet]) -> None:
    exact, rounded = fitted(model, "3", storage="float16"), fitted(model, "3", storage="int8")
    weight, near = exact.fills[3, 5].weight[0], rounded.fills[3, 5].weight[0]
    step = weight.abs().amax(0) / 127
    assert bool(((weight - near).abs() <= 0.51 * step + 1e-3 * weight.abs()).all())
    assert rounded.bytes < 0.65 * exact.bytes
    again = stored(rounded.fills, "int8")
    assert torch.equal(again["3-5.weight.0"], rounded.tensors["3-5.weight.0"])


def test_another_model_and_segments_that_do_not_fit_are_refused(
    model: PolarModel, fitted: Callable[..., FillSet]
) -> None:
    made = fitted(model, "4")
    with pytest.raises(FillModelError, match="fitted for model"):
        tiny_model(seed=1).use_fills(made)
    record = made.records[0].model_copy(update={"first": 5, "last": 6})
    moved = {name.replace("4-5", "5-6"): tensor for name, tensor in made.tensors.items()}
    with pytest.raises(FillError, match=r"\(5-6\) does not fit a model of 6 layers"):
        model.use_fills(replace(made, tensors=moved, records=(record,)))
    for text, match in (("0", "does not fit"), ("6", "does not fit"), ("4-3", "does not fit"), ("x", "does not parse")):
        with pytest.raises(FillError, match=match):
            parse_fills(text, 6)


def test_damaged_files_are_named_on_one_line(model: PolarModel, tmp_path: Path, fitted: Callable[..., FillSet]) -> None:
    folder = tmp_path / "fills"
    with pytest.raises(FillDamagedError, match="cannot be read"):
        FillSet.load(folder)
    made = fitted(model, "4", out=folder, units=8)
    weights = (folder / "fills.safetensors").read_bytes()
    (folder / "fills.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(FillDamagedError, match="is not the file that"):
        FillSet.load(folder)
    for tensors, match in (
        ({**made.tensors, "4-5.bias": torch.zeros(1, 2, 2, 12)}, "not that of 2 layers"),
        ({**made.tensors, "4-5.weight.0": torch.zeros(48, 5)}, "factors of shapes"),
        ({name: value for name, value in made.tensors.items() if name != "4-5.bias"}, r"4-5\.bias"),
        ({**made.tensors, "4-5.bias": made.tensors["4-5.bias"] * float("nan")}, "not finite"),
        ({**made.tensors, "4-5.hidden.bias": torch.zeros(9)}, r"hidden units of shapes \(48, 8\) and \(9,\)"),
        ({**made.tensors, "4-5.weight.0": torch.zeros(50, 96)}, "hidden units of shape"),
        ({**made.tensors, "4-5.carry.weight": torch.zeros(48, 48)}, r"4-5\.carry\.bias"),
        ({**made.tensors, "4-5.carry.weight": torch.zeros(48, 48), "4-5.carry.bias": torch.zeros(48)}, "has a carry"),
        ({name: value for name, value in made.tensors.items() if name != "4-5.hidden.bias"}, r"4-5\.hidden\.bias"),
    ):
        replace(made, tensors=tensors).save(folder)
        with pytest.raises(FillDamagedError, match=match) as caught:
            FillSet.load(folder)
        assert "\n" not in str(caught.value)
    text = json.loads((folder / "fills.json").read_text())
    (folder / "fills.json").write_text(json.dumps({**text, "storage": "int3"}))
    with pytest.raises(FillDamagedError, match="storage"):
        FillSet.load(folder)


def test_candidates_are_cuts_and_the_least_harmful_layers() -> None:
    harms = {layer: 0.01 * (30 - layer) for layer in range(1, 30)}
    cuts = [((first, 29),) for first in (27, 24, 22, 20, 17, 15)]
    assert candidates(harms, 30) == [[cut] for cut in cuts]
    vital = {**harms, 22: 1.0, 28: 2.0}
    assert candidates(vital, 30)[0] == [((27, 29),), ((26, 27), (29, 29))]
    assert candidates(vital, 30)[3] == [((20, 29),), ((18, 21), (23, 27), (29, 29))]
    assert candidates({1: 0.5}, 2) == [[((1, 1),)]]


def test_what_to_fill_is_found_by_measuring(texts: list[Item], tmp_path: Path, fitted: Callable[..., FillSet]) -> None:
    """A layer whose work no affine map does, and on which answers depend, runs in every program that is found."""
    network = tiny_llama()
    with torch.no_grad():
        network.model.layers[3].mlp.gate_proj.weight *= 20
        network.model.layers[4].self_attn.o_proj.weight *= 30
    model = PolarModel.from_hf(network, tiny_tokenizer(), policy=Policy.permissive(), ledger=None, compile=False)
    made = fitted(model, "default", out=tmp_path / "fills", tail=2, storage="float16")
    found = FillSet.load(tmp_path / "fills").programs
    assert [len([step for step in program if step.fill]) for program in found] == [1, 2, 3]
    assert {segment for program in found for segment in program.fills} == set(made.fills)
    assert [program.text for program in found] == ["0-4 (5:2)", "0-3 (4-5:2)", "0-1 (2:2) 3 (4-5:2)"]
    assert fitted(model, "default", tail=2, storage="float16").programs == found
    too_short = FillOptions(answer_tokens=6, tail=400)
    with pytest.raises(FillError, match="cannot be measured: the model needs two layers, and a prompt 402 tokens"):
        FillHealer(model, texts, "default", options=too_short).run()


def test_parts_of_what_to_fill() -> None:
    assert parse_fills("27, 20-23,(18-29)", 30) == [((27, 29),), ((20, 23),), ((18, 29),)]


@pytest.mark.parametrize(
    "wrong", [{"ridge": 0}, {"rank": 0}, {"units": -1}, {"tail": 0}, {"distil": -1}, {"rate": 0}, {"storage": "int4"}]
)
def test_options_out_of_range_name_themselves(wrong: dict[str, object]) -> None:
    with pytest.raises(FillError, match=next(iter(wrong))):
        FillOptions(**wrong)  # type: ignore[arg-type]


def test_without_a_prompt_answered_in_text_there_is_nothing_to_fit(model: PolarModel) -> None:
    questions = [lab.ChoiceItem(question=f"which {thing}?", choices=("a", "b"), answer=0) for thing in "xyz"]
    with pytest.raises(FillError, match="answered in text"):
        lab.heal_fills(model, questions, "3")


def test_the_command_fits_either_bridges_or_fills(
    model: PolarModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[Item]
) -> None:
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("polar_sdk.cli.options.load_model", lambda *_, **__: model)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(item.model_dump_json() for item in texts), encoding="utf-8")
    command = ["lab", "heal", "--data", str(data), "--answer-tokens", "6", "--out", str(tmp_path / "fills")]
    both = CliRunner().invoke(app, [*command, "--fills", "4", "--segments", "1-2"])
    assert (both.exit_code, "one of the two" in both.output) == (2, True)
    for given, option, only_with in (
        (["--segments", "1-2", "--units", "0"], "--units", "--fills"),
        (["--segments", "1-2", "--tail", "16"], "--tail", "--fills"),
        (["--fills", "4", "--labels", "1"], "--labels", "--segments"),
    ):
        useless = CliRunner().invoke(app, [*command, *given])
        assert useless.exit_code == 2
        assert f"{option} is for {only_with} and changes nothing here" in " ".join(useless.output.split())
    done = CliRunner().invoke(app, [*command, "--fills", "4,2", "--units", "4", "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.output)
    assert facts["segments"][0]["kind"] == "full rank, 4 units"
    assert [(row["first"], row["last"]) for row in facts["segments"]] == [(4, 5), (2, 5)]
    assert set(FillSet.load(tmp_path / "fills").fills) == {(4, 5), (2, 5)}


def test_ctrl_c_says_where_the_same_command_goes_on(
    model: PolarModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("POLAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("polar_sdk.cli.options.load_model", lambda *_, **__: model)
    monkeypatch.setattr("polar_sdk.lab.heal_fills", interrupted)
    command = ["lab", "heal", "--fills", "4", "--out", str(tmp_path)]
    before = CliRunner().invoke(app, command)
    assert (before.exit_code, "--resume" in before.stderr) == (130, False)
    assert "the same command starts from there" in before.stderr
    (tmp_path / "checkpoint.safetensors").touch()
    assert "the same command with --resume" in CliRunner().invoke(app, command).stderr


def test_training_comes_nearer_to_full_depth_and_resumes_where_it_stopped(
    model: PolarModel, tmp_path: Path, texts: list[Item], fitted: Callable[..., FillSet]
) -> None:
    class Stopped(Exception):  # noqa: N818
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "training fills" and done == 9:
            raise Stopped

    options = FillOptions(answer_tokens=6, distil=24, rate=5e-4, storage="float16")
    whole = FillHealer(model, texts, "2,4", tmp_path / "whole", options=options).run()
    assert whole.training["losses"][-1] < 0.9 * whole.training["losses"][0]
    closed = digests(fitted(model, "2,4", storage="float16"))
    for row in whole.training["held_out"]:  # few prompts: where training only learned them by heart, it is not kept
        (segment,) = Program.parse(row["program"]).fills
        assert (digests(whole)[segment] == closed[segment]) == (row["trained"] >= row["closed_form"])
    with pytest.raises(Stopped):
        FillHealer(model, texts, "2,4", tmp_path / "cut", on_progress=stop, options=options).run()
    assert (tmp_path / "cut" / "checkpoint.safetensors").is_file()
    other = replace(options, distil=25, resume=True)
    with pytest.raises(FillError, match="other data, segments or settings"):
        FillHealer(model, texts, "2,4", tmp_path / "cut", options=other).run()
    again = FillHealer(model, texts, "2,4", tmp_path / "cut", options=replace(options, resume=True)).run()
    assert digests(again) == digests(whole)
    assert not (tmp_path / "cut" / "checkpoint.safetensors").exists()
    assert again.training["losses"] == whole.training["losses"]


def test_training_by_products_of_bfloat16_takes_the_same_way(
    model: PolarModel, texts: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = FillOptions(answer_tokens=6, distil=24, rate=5e-4, storage="float16")
    losses = []
    for pays in (False, True):
        monkeypatch.setattr("polar_sdk.lab.healing.training._halves_pay", lambda _, pays=pays: pays)
        losses.append(FillHealer(model, texts, "2,4", options=options).run().training["losses"])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_training_goes_on_from_fills_that_are_there(
    model: PolarModel, tmp_path: Path, texts: list[Item], fitted: Callable[..., FillSet]
) -> None:
    first = fitted(model, "4", out=tmp_path / "first", storage="float16", ridge=0.5)
    both = fitted(model, "2,4", storage="float16", start=str(tmp_path / "first"))
    assert list(both.fills) == [(2, 5), (4, 5)]
    assert digests(both)[4, 5] == digests(first)[4, 5]
    assert digests(both)[2, 5] == digests(fitted(model, "2", storage="float16"))[2, 5]
    more = fitted(model, "4", storage="float16", start=str(tmp_path / "first"), distil=24, rate=5e-4)
    row = more.training["held_out"][0]
    assert row["trained"] < row["closed_form"]
    assert digests(more)[4, 5] != digests(first)[4, 5]
    assert more.training["start"]["programs"] == first.training["programs"]
    assert str(tmp_path) not in json.dumps(more.training)  # it is published with the router
    with pytest.raises(FillModelError, match="fitted for model"):
        fitted(tiny_model(seed=1, policy=Policy.permissive()), "4", start=str(tmp_path / "first"))


def test_the_last_tokens_of_a_prompt_are_not_filled_in_training(
    model: PolarModel, fitted: Callable[..., FillSet]
) -> None:
    """The more of a prompt runs, the less there is to learn, and where all of it runs, nothing."""
    first = [fitted(model, "2", distil=1, tail=tail).training["losses"][0] for tail in (1, 12)]
    assert first[1] < 0.9 * first[0]
    with pytest.raises(FillError, match="has a token to fill between its first and its last 1000;"):
        fitted(model, "2", distil=1, tail=1000)


def test_states_that_do_not_fit_in_memory_are_computed_again(
    model: PolarModel, fitted: Callable[..., FillSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polar_sdk.lab.healing.run.TRAIN_TOKENS", 64)
    monkeypatch.setattr("polar_sdk.lab.healing.fill_healer.TRAIN_TOKENS", 64)
    kept = fitted(model, "2,4", distil=12)
    monkeypatch.setattr("polar_sdk.lab.healing.fill_training._MAX_KEPT", 20_000)
    again = fitted(model, "2,4", distil=12)
    assert again.training["losses"] == kept.training["losses"]
    assert digests(again) == digests(kept)


def test_the_menu_of_a_search_has_a_program_for_every_fill(
    model: PolarModel, texts: list[Item], fitted: Callable[..., FillSet]
) -> None:
    model.use_fills(fitted(model, "2,4"))
    found = lab.search(model, texts, budgets=(0.85,), population=3, generations=1, menu=5, answer_tokens=6, prompts=8)
    menu = [program.text for program in found.matrix.programs]
    assert {"0-3 (4-5:16)", "0-1 (2-5:16)"} <= set(menu)
    column = menu.index("0-3 (4-5:16)")
    assert bool((found.matrix.flops[:, column] < found.matrix.flops[:, 0]).all())
    assert 0.5 < float(found.matrix.share[:, column].mean()) <= 1
    made = fitted(model, "1-2+4")
    model.use_fills(made)
    options: dict[str, Any] = {"budgets": (0.85,), "population": 2, "generations": 0, "answer_tokens": 6, "prompts": 8}
    together = lab.search(model, texts, programs=made.programs, menu=3, **options)
    menu = [program.text for program in together.matrix.programs]
    assert "0 (1-2:16) 3 (4-5:16)" in menu
    assert "0-3 (4-5:16)" not in menu  # which each fill alone would be
