"""Maps of both kinds: what the closed form finds, what training gains, and how maps are stored, refused and used."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from polar_sdk import PolarModel, Policy, Program, lab
from polar_sdk.engine.maps import Bridge
from polar_sdk.engine.scoring import score_programs, states_after
from polar_sdk.errors import DataError, MapDamagedError, MapError, MapModelError, MissingMapError, RouterError
from polar_sdk.lab.healing.bridges import BridgeMethod, bridge_between
from polar_sdk.lab.healing.distillation import MapLoss, Predictions, choice_scores, loss_of, slots_of
from polar_sdk.lab.healing.fills import FillMethod, candidates
from polar_sdk.lab.healing.heal import Healer
from polar_sdk.lab.healing.method import BridgeOptions, FillOptions, LossWeights
from polar_sdk.lab.healing.packs import make_packs
from polar_sdk.lab.healing.ridge import RidgeSums
from polar_sdk.lab.items import ChoiceItem, Item, PromptItem
from polar_sdk.lab.rewards.cache import RewardCache
from polar_sdk.lab.rewards.measure import Measurer
from polar_sdk.lab.rewards.tasks import Task, make_tasks
from polar_sdk.router.map_set import MapKind, MapSet, stored
from polar_sdk.router.store import map_folders, save_with_maps
from polar_sdk.testing import tiny_llama, tiny_model, tiny_tokenizer
from tests.sdk.command import polar
from tests.sdk.fixed_router import fixed_router

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Fit = Callable[..., MapSet]

DEPTH = 6
OPTIONS: dict[MapKind, type[BridgeOptions | FillOptions]] = {"bridge": BridgeOptions, "fill": FillOptions}


@dataclass(frozen=True)
class Kind:
    """A kind of map, with segments of two groups and a program that uses one of them."""

    name: MapKind
    segments: str
    program: str
    segment: tuple[int, int]
    flag: str


BRIDGES = Kind("bridge", "1-2;2,4", "0 1 [2] 3 [4] 5", (1, 2), "--segments")
FILLS = Kind("fill", "2-3,4", "0-3 (4-5)", (4, 5), "--fills")
both = pytest.mark.parametrize("kind", [BRIDGES, FILLS], ids=lambda kind: kind.name)


@pytest.fixture
def model() -> PolarModel:
    return tiny_model(policy=Policy.permissive())


@pytest.fixture(scope="module")
def texts() -> list[Item]:
    words = "apples pears boats trains clouds rivers stones birds maps songs lamps doors".split()  # noqa: SIM905
    return [
        PromptItem(prompt=f"number {place}: tell me of {word} and {words[-place % 12]}")
        for place, word in enumerate(words * 3)
    ]


@pytest.fixture
def fit(texts: list[Item], mixed_items: list[Item]) -> Fit:
    """Fit maps, which the model does not use yet: bridges on prompts and choices, fills on prompts."""

    def run(
        model: PolarModel,
        kind: Kind,
        segments: str | None = None,
        out: Path | None = None,
        on_progress: Any = lambda *_: None,
        **options: object,
    ) -> MapSet:
        items = mixed_items if kind is BRIDGES else texts
        few = {"answer_tokens": 6} if kind is BRIDGES else {"answer_tokens": 6, "token": 2}
        chosen = OPTIONS[kind.name].of(**{**few, **options})
        return Healer(model, chosen, items, segments or kind.segments, out, RewardCache(), on_progress).run()

    return run


def digests(maps: MapSet) -> dict[tuple[int, int], str]:
    return {segment: each.digest for segment, each in maps.maps.items()}


def errors(maps: MapSet) -> list[float]:
    """The errors on held-out prompts, in order."""
    found = [record.error for record in maps.facts.segments if record.error is not None]
    assert len(found) == len(maps.facts.segments)
    return found


# Closed form


def test_ridge_finds_the_bridge_that_made_the_states() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(8, 8, generator=generator), torch.randn(8, generator=generator)
    before = torch.randn(400, 8, generator=generator) + 3
    positions = torch.arange(400) % 20
    after = before + before @ weight + bias
    after[positions == 0] = before[positions == 0] + 1000.0  # what would bend a fit that took it in
    parts = (slice(0, 150), slice(150, 400))  # two packs
    found = bridge_between([(before[part], after[part], positions[part] != 0) for part in parts], 1e-9)
    assert torch.allclose(found.weight[0], weight, atol=1e-4)
    assert torch.allclose(found.bias, bias, atol=1e-3)
    assert torch.allclose(found(before, positions), after, atol=1e-2)


def test_a_low_rank_map_is_the_best_of_its_rank_on_what_it_saw() -> None:
    """Reduced-rank regression against cutting the singular values of the weight, with inputs of unequal size."""
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(500, 8, generator=generator) * torch.tensor([9.0, 5, 1, 1, 0.3, 0.3, 0.1, 0.1])
    after = before + before @ torch.randn(8, 8, generator=generator)
    positions = torch.ones(500, dtype=torch.long)
    full, low = (bridge_between([(before, after, positions != 0)], 1e-9, rank) for rank in (None, 2))
    assert (low.rank, full.rank) == (2, None)
    left, values, right = torch.linalg.svd(full.weight[0])
    cut = Bridge(((left[:, :2] * values[:2]), right[:2]), full.bias, full.first)
    missed = [float((one(before, positions) - after).square().sum()) for one in (full, low, cut)]
    assert missed[0] < 1e-2 < missed[1] < 0.9 * missed[2]


def test_bridges_come_nearer_to_the_segment_than_a_skip_and_correct_earlier_ones(model: PolarModel, fit: Fit) -> None:
    made = fit(model, BRIDGES, "1-2,4;2-4")
    assert [record.segment for record in made.facts.segments] == [(1, 2), (4, 4), (2, 4)]
    assert max(errors(made)) < 0.9
    assert model.loaded.decoder.bridges == {}  # fitting leaves the model alone
    assert digests(made)[4, 4] != digests(fit(model, BRIDGES, "4"))[4, 4]
    assert digests(made)[1, 2] == digests(fit(model, BRIDGES, "1-2"))[1, 2]


def test_the_first_layer_of_a_fill_is_found_exactly_and_later_ones_nearly(model: PolarModel, fit: Fit) -> None:
    """Keys and values of a layer are a linear map of its own normalised input."""
    one, three, four = errors(fit(model, FILLS, "3-3,3-5,2", storage="float16", ridge=1e-7))
    assert one < 1e-3 < three < four < 1
    assert model.decoder.fills == {}


def test_maps_of_lower_rank_and_without_hidden_units_miss_more(model: PolarModel, fit: Fit) -> None:
    made = [fit(model, FILLS, "3", rank=rank) for rank in (2, 12, None)]
    made.append(fit(model, FILLS, "3", units=24, storage="float16"))
    shares = [errors(each)[0] for each in made]
    assert shares == sorted(set(shares), reverse=True)
    forms = [each.facts.segments[0].form.split(", ") for each in made]
    assert [form[:-1] for form in forms] == [["rank 2"], ["rank 12"], ["full rank"], ["full rank", "24 units"]]
    assert all(form[-1].startswith("token rank ") for form in forms)
    assert (
        made[0].facts.segments[0].flops_per_token
        < made[2].facts.segments[0].flops_per_token
        < made[3].facts.segments[0].flops_per_token
    )
    other = fit(model, FILLS, "3", units=24, storage="float16", seed=1).fills[3, 5]
    assert not torch.equal(made[3].fills[3, 5].hidden[0], other.hidden[0])


def test_a_fill_reads_as_much_of_the_embedding_as_is_asked_for(model: PolarModel, fit: Fit) -> None:
    made = [fit(model, FILLS, "3", token=token) for token in (0, 2, None, 999)]  # a sixth of the size by default
    forms = [each.facts.segments[0].form for each in made]
    assert forms == ["full rank", *(f"full rank, token rank {rank}" for rank in (2, 8, 48))]
    assert [len(each.fills[3, 5].token) for each in made] == [0, 2, 2, 1]
    costs = [each.facts.segments[0].flops_per_token for each in made]
    assert costs == sorted(set(costs))


def test_a_second_map_beside_the_first_explains_what_that_leaves() -> None:
    """Of full rank both are the map of all inputs; of lower rank they are as near as two such maps can be."""
    dice = torch.Generator().manual_seed(1)
    inputs, noise = torch.randn(400, 12, generator=dice) + 1, torch.randn(400, 7, generator=dice)
    outputs = inputs @ torch.randn(12, 7, generator=dice) + 0.1 * noise + 3
    sums = RidgeSums(12, [7], torch.device("cpu"))
    sums.add_inputs(inputs)
    sums.add_outputs(0, inputs, outputs)

    def missed(rank: int) -> float:
        found = sums.solve(1e-6, inputs=8, beside=rank)
        (weight,), second = found.weight, found.beside
        added = inputs[:, 8:] @ (second[0] if len(second) == 1 else second[0] @ second[1]) if second else 0.0
        assert [factor.shape[1] for factor in second[:-1]] == ([rank] if 0 < rank < 4 else [])
        return float((inputs[:, :8] @ weight + added + found.bias - outputs).square().sum())

    whole = sums.solve(1e-6)
    assert missed(4) == pytest.approx(float((inputs @ whole.weight[0] + whole.bias - outputs).square().sum()), rel=1e-3)
    assert missed(0) > missed(1) > missed(2) > missed(3) > missed(4)
    alone = sums.solve(1e-6, inputs=8)
    assert not alone.beside
    assert missed(0) == pytest.approx(float((inputs[:, :8] @ alone.weight[0] + alone.bias - outputs).square().sum()))


def test_a_carry_brings_states_near_those_after_the_segment(model: PolarModel, texts: list[Item], fit: Fit) -> None:
    """If layers follow the segment; a program of the map is nearer to full depth than one whose states pass."""
    made = fit(model, FILLS, "2-3,2", storage="float16")
    carried, last = made.fills[2, 3], made.fills[2, 5]
    assert [len(fill.carry) for fill in (carried, last)] == [2, 0]
    tokens = [tuple(model.encode(item.prompt)) for item in texts if isinstance(item, PromptItem)]
    identity, program = Program.identity(DEPTH), Program.parse("0-1 (2-3) 4-5")
    wanted = [states[-1] for states in states_after(model.decoder, tokens, identity.steps)]
    missed = []
    for fill in (carried, replace(carried, carry=())):
        model.decoder.set_fills({(2, 3): fill.to(model.decoder.dtype, model.decoder.device)})
        found = [states[-1] for states in states_after(model.decoder, tokens, program.steps)]
        missed.append(sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True)))
    assert missed[0] < 0.9 * missed[1]


# Segments and options


def asked(kind: Kind, text: str, depth: int = DEPTH) -> object:
    method = BridgeMethod(BridgeOptions(), depth) if kind is BRIDGES else FillMethod(FillOptions(), depth)
    return method.groups(text)


@pytest.mark.parametrize(
    ("kind", "text", "groups"),
    [
        (BRIDGES, "4, [1-2];2-4;", [((1, 2), (4, 4)), ((2, 4),)]),
        (BRIDGES, "0-1,2", [((0, 1), (2, 2))]),
        (FILLS, "4, 4+1-2 ,(1-2)+(4-5)", [((4, 5),), ((1, 2), (4, 5))]),
        (FILLS, "2-3,(1-5)", [((2, 3),), ((1, 5),)]),
    ],
)
def test_segments_in_groups(kind: Kind, text: str, groups: object) -> None:
    assert asked(kind, text) == groups


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *((BRIDGES, text) for text in ("", "1-x", "4-2", "3-6", "1-3,3-4", "0-5", "0-2,3-5")),
        *((FILLS, text) for text in ("", "x", "0", "6", "4-3", "1-2+3", "1-3+2", "3+3")),
    ],
)
def test_segments_that_make_no_sense(kind: Kind, text: str) -> None:
    with pytest.raises(MapError):
        asked(kind, text)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *((kind, name, value) for kind in (BRIDGES, FILLS) for name, value in
          (("ridge", 0), ("ridge", float("nan")), ("rank", 0), ("distil", -1), ("rate", 0), ("answer_tokens", 0))),
        *((BRIDGES, name, value) for name, value in (("drop", 1.0), ("labels", -1), ("choices", -1), ("units", 4))),
        *((FILLS, name, value) for name, value in
          (("units", -1), ("tail", 0), ("prompts", 0), ("storage", "int4"), ("labels", 1))),
    ],
)  # fmt: skip
def test_options_out_of_range_and_of_the_other_kind_are_named(kind: Kind, name: str, value: object) -> None:
    with pytest.raises(MapError, match=name):
        OPTIONS[kind.name].of(**{name: value})


@both
def test_models_and_data_that_cannot_be_fitted_on(
    kind: Kind, model: PolarModel, mixed_items: list[Item], fit: Fit
) -> None:
    for items in ([], [PromptItem(prompt="a"), PromptItem(prompt="A")]):
        with pytest.raises(DataError):
            lab.heal(model, items, kind.segments, kind=kind.name)
    if kind is FILLS:
        with pytest.raises(MapError):  # fills are not trained on questions with choices
            lab.heal(model, mixed_items[12:], "3", kind="fill", distil=1)


# Files


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (BRIDGES, {}),
        (BRIDGES, {"rank": 4}),
        *((FILLS, {"storage": storage, "units": units}) for storage in ("int8", "float16") for units in (0, 8)),
    ],
)
def test_maps_are_the_same_before_they_were_stored_and_after(
    kind: Kind, options: dict[str, object], model: PolarModel, tmp_path: Path, fit: Fit
) -> None:
    made = fit(model, kind, out=tmp_path / "maps", **options)
    read = MapSet.load(tmp_path / "maps")
    assert read.facts == made.facts
    assert digests(read) == digests(made)
    assert read.bytes == made.bytes
    segment = kind.segment
    alone = read.only({segment})
    alone.save(tmp_path / "alone")
    assert digests(MapSet.load(tmp_path / "alone")) == {segment: digests(made)[segment]}
    with pytest.raises(MissingMapError):
        model.generate("hello", program=kind.program)
    model.use_maps(tmp_path / "maps")
    placed = model.decoder.bridges if kind is BRIDGES else model.decoder.fills
    assert {segment: each.digest for segment, each in placed.items()} == digests(made)
    other = tiny_model(policy=Policy.permissive(), maps=tmp_path / "maps")
    one, two = (each.generate("hello " * 9, program=kind.program, max_tokens=5) for each in (model, other))
    assert one.token_ids == two.token_ids
    assert one.usage.flops == two.usage.flops
    assert one.usage.flops == model.cost(kind.program, prompt=one.usage.tokens.input, output=5)


def test_int8_is_within_half_a_step_of_each_output(model: PolarModel, fit: Fit) -> None:
    exact, rounded = fit(model, FILLS, "3", storage="float16"), fit(model, FILLS, "3", storage="int8")
    weight, near = exact.fills[3, 5].weight[0], rounded.fills[3, 5].weight[0]
    step = weight.abs().amax(0) / 127
    assert bool(((weight - near).abs() <= 0.51 * step + 1e-3 * weight.abs()).all())
    assert rounded.bytes < 0.65 * exact.bytes
    again = stored(rounded.fills, "int8")
    assert torch.equal(again["3-5.weight.0"], rounded.tensors["3-5.weight.0"])


@both
def test_maps_of_another_model_and_of_other_sizes_are_refused(kind: Kind, model: PolarModel, fit: Fit) -> None:
    made = fit(model, kind, "4-5")
    with pytest.raises(MapModelError):
        tiny_model(seed=1).use_maps(made)
    for first, last in ((5, 6), (0, 0)) if kind is FILLS else ((5, 6),):
        moved = {name.replace("4-5", f"{first}-{last}"): tensor for name, tensor in made.tensors.items()}
        record = made.facts.segments[0].model_copy(update={"first": first, "last": last})
        with pytest.raises(MapError, match=f"{first}-{last}"):
            model.use_maps(MapSet(made.facts.model_copy(update={"segments": (record,)}), moved))
    wide = PolarModel.from_hf(tiny_llama(hidden_size=64), tiny_tokenizer(), ledger=None)
    with pytest.raises(MapError, match="64"):
        wide.use_maps(MapSet(made.facts.model_copy(update={"fingerprint": wide.fingerprint}), made.tensors))


@both
def test_damaged_files_are_named_on_one_line(kind: Kind, model: PolarModel, tmp_path: Path, fit: Fit) -> None:
    folder = tmp_path / "maps"

    def check(says: str) -> None:
        with pytest.raises(MapDamagedError, match=says) as caught:
            MapSet.load(folder)
        assert "\n" not in str(caught.value)

    check("maps.json")
    made = fit(model, kind, "4-5", out=folder, **({"units": 8} if kind is FILLS else {}))
    tensors, weights = made.tensors, (folder / "maps.safetensors").read_bytes()
    (folder / "maps.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    check("maps.safetensors")
    changes: list[dict[str, torch.Tensor | None]] = [
        {"4-5.weight.0": torch.zeros(48, 5)},
        {"4-5.bias": torch.zeros(1)},
        {"4-5.bias": None},
        {"4-5.weight.0": None},
        {"4-5.bias": tensors["4-5.bias"] * float("nan")},
    ]
    if kind is BRIDGES:
        changes += [{"4-5.first": None}, {"4-5.first": torch.zeros(9)}]
    else:
        changes += [
            {"4-5.hidden.bias": torch.zeros(9)},
            {"4-5.hidden.bias": None},
            {"4-5.weight.0.scale": None},
            {"4-5.weight.0": torch.zeros(50, 96)},
            {"4-5.carry.weight": torch.zeros(48, 48)},
            {"4-5.carry.weight": torch.zeros(48, 48), "4-5.carry.bias": torch.zeros(48)},
        ]
    for change in changes:
        changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        MapSet(made.facts, changed).save(folder)
        check("4-5")
    made.save(folder)
    facts = json.loads((folder / "maps.json").read_text())
    segments = [{**facts["segments"][0], "first": 3}]
    for wrong, says in (
        ({"format": "polar-maps-9"}, "polar-maps-9"),
        ({"segments": "all"}, "segments"),
        ({"segments": segments}, "3-5"),
        ({"storage": "int3"}, "storage"),
        ({"training": {"programs": ["0-"]}}, "maps.json"),
    ):
        (folder / "maps.json").write_text(json.dumps(facts | wrong))
        check(says)


# Serving


def test_what_fills_spare_of_a_choice_question_is_what_is_not_executed(model: PolarModel, fit: Fit) -> None:
    """Attention is counted per question, and runs in blocks of several: hence not to the FLOP."""
    model.use_maps(fit(model, FILLS, "3-5,4-5"))
    item = ChoiceItem(question="which of them is the largest of all? " * 2, choices=("red", "green"), answer=1)
    tasks = make_tasks(model, [item], RewardCache())
    programs = [Program.identity(DEPTH), Program.parse("0-3 (4-5)"), Program.parse("0-2 (3-5:4)")]
    rewards = Measurer(model, RewardCache()).rewards(tasks, programs)
    counted = []
    for program in programs:
        with FlopCounterMode(display=False) as counter:
            score_programs(model.decoder, [tasks[0].question], [program])
        counted.append(counter.get_total_flops())
    stated = [int(rewards[program].flops[0]) for program in programs]
    assert stated[0] > stated[1] > stated[2]
    assert stated == [pytest.approx(flops, rel=0.1) for flops in counted]
    assert [one / stated[0] for one in stated] == [pytest.approx(flops / counted[0], rel=0.03) for flops in counted]


def test_the_menu_of_a_search_has_a_program_for_every_fill(model: PolarModel, texts: list[Item], fit: Fit) -> None:
    options: dict[str, Any] = {"budgets": (0.85,), "answer_tokens": 6, "prompts": 8}
    model.use_maps(fit(model, FILLS, "2,4"))
    matrix = lab.search(model, texts, population=3, generations=1, menu=5, **options).matrix
    menu = [program.text for program in matrix.programs]
    assert {"0-3 (4-5:16)", "0-1 (2-5:16)"} <= set(menu)
    column = menu.index("0-3 (4-5:16)")
    assert bool((matrix.flops[:, column] < matrix.flops[:, 0]).all())
    assert 0.5 < float(matrix.share[:, column].mean()) <= 1
    made = model.use_maps(fit(model, FILLS, "1-2+4"))
    matrix = lab.search(model, texts, programs=made.programs, population=2, generations=0, menu=3, **options).matrix
    menu = [program.text for program in matrix.programs]
    assert "0 (1-2:16) 3 (4-5:16)" in menu
    assert "0-3 (4-5:16)" not in menu  # which each fill alone would be


# Training


@both
def test_training_comes_nearer_to_full_depth_and_is_kept_where_it_does(
    kind: Kind, model: PolarModel, texts: list[Item], fit: Fit
) -> None:
    made, closed = (fit(model, kind, distil=steps, rate=5e-4) for steps in (24, 0))
    assert len(made.facts.training["losses"]) == 24
    rows = made.facts.training["held_out"]
    assert any(row["trained"] < 0.98 * row["closed_form"] for row in rows)
    kept = {segment for row in rows for segment in _used(row["program"]) if row["kept"]}
    lost = {segment for row in rows for segment in _used(row["program"]) if not row["kept"]}
    for segment in made.maps:
        assert (digests(made)[segment] != digests(closed)[segment]) == (segment in kept - lost)
    for row in rows if kind is FILLS else ():
        assert row["kept"] == (row["trained"] < row["closed_form"])
    weights = [each for layer in model.loaded.decoder.layers for each in layer.values()]
    assert not any(each.requires_grad for each in weights if isinstance(each, torch.Tensor))


@both
@pytest.mark.parametrize("pays", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_weights_of_any_precision_let_gradients_pass(
    kind: Kind, precision: str, pays: bool, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polar_sdk.lab.healing.distillation._halves_pay", lambda _: pays)
    model = PolarModel.from_hf(tiny_llama(), tiny_tokenizer(), precision=precision, ledger=None)
    rows = fit(model, kind, distil=16, rate=3e-4).facts.training["held_out"]
    assert any(row["trained"] < row["closed_form"] for row in rows)


def test_maps_of_wide_states_learn_more_slowly(model: PolarModel, fit: Fit) -> None:
    rates = [FillOptions().learning_rate(width) for width in (64, 576, 1536, 4096)]
    assert rates[0] == rates[1] > rates[2] > rates[3]
    assert rates[2] * 1536 == pytest.approx(rates[3] * 4096)
    assert FillOptions(rate=1e-3).learning_rate(4096) == 1e-3
    assert BridgeOptions().learning_rate(576) == BridgeOptions().learning_rate(4096)
    assert fit(model, FILLS).facts.training["rate"] == rates[0]


def test_programs_of_many_fills_take_turns() -> None:
    method, groups = FillMethod(FillOptions(), 24), [((cut, 23),) for cut in range(12, 24)]
    steps = [method.lessons(groups, step) for step in range(8)]
    assert all(len(lessons) < len(groups) for lessons in steps)
    counts = Counter(program.text for lessons in steps for program in lessons)
    assert set(counts) == {method.program(group).text for group in groups}
    assert max(counts.values()) == min(counts.values())


def _used(text: str) -> tuple[tuple[int, int], ...]:
    program = Program.parse(text)
    return program.bridges + program.fills


@both
def test_bridges_keep_training_together_and_fills_group_by_group(
    kind: Kind, model: PolarModel, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, results = fit(model, kind), ((1.0, 1.0), (0.1, 1.2))  # before training and after it
    monkeypatch.setattr(
        MapLoss, "means", lambda self, *_, **__: [dict(zip(self._groups, losses, strict=True)) for losses in results]
    )
    made = fit(model, kind, distil=2)
    assert [row["kept"] for row in made.facts.training["held_out"]] == [True, kind is BRIDGES]
    lost = (4, 4 if kind is BRIDGES else 5)
    assert (digests(made)[lost] == digests(closed)[lost]) == (kind is FILLS)


def test_every_other_step_drops_bridges_but_never_all() -> None:
    groups = [((1, 1), (3, 3)), ((2, 4),)]
    method = BridgeMethod(BridgeOptions(drop=0.5), DEPTH)
    used = [program.bridges for step in range(80) for program in method.lessons(groups, step)]
    assert set(used[::4]) == {groups[0]}
    assert set(used[1::2]) == {groups[1]}
    assert set(used[2::4]) == {((1, 1),), ((3, 3),), groups[0]}


def test_what_is_read_of_the_embedding_stays_as_it_was_solved(model: PolarModel, fit: Fit) -> None:
    closed, trained = (fit(model, FILLS, "2", token=2, distil=steps, storage="float16") for steps in (0, 24))
    assert trained.facts.training["held_out"][0]["kept"]
    solved, later = closed.fills[2, 5], trained.fills[2, 5]
    assert all(map(torch.equal, solved.token, later.token))
    assert not torch.equal(solved.weight[0], later.weight[0])


def test_hidden_units_train_on(model: PolarModel, fit: Fit) -> None:
    drawn, learned = (fit(model, FILLS, "2", units=24, distil=steps, storage="float16") for steps in (0, 24))
    assert learned.facts.training["losses"][-1] < 0.9 * learned.facts.training["losses"][0]
    assert learned.facts.training["held_out"][0]["kept"]
    assert not torch.equal(drawn.fills[2, 5].hidden[0], learned.fills[2, 5].hidden[0])


@both
def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(
    kind: Kind, model: PolarModel, tmp_path: Path, fit: Fit
) -> None:
    class Stop(KeyboardInterrupt):
        pass

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == f"training {kind.name}s" and done == 7:
            raise Stop

    steps: list[int] = []

    def note(stage: str, done: int, total: int) -> None:
        if stage == f"training {kind.name}s":
            steps.append(done)

    options = {"distil": 12, **({"drop": 0.5} if kind is BRIDGES else {})}
    whole = fit(model, kind, **options)
    with pytest.raises(Stop):
        fit(model, kind, out=tmp_path, on_progress=interrupt, **options)
    assert not (tmp_path / "maps.json").exists()
    assert (tmp_path / "checkpoints" / "maps.safetensors").is_file()
    again = fit(model, kind, out=tmp_path, on_progress=note, **options)
    assert steps == [8, 9, 10, 11, 12]
    assert again.facts.training["losses"] == whole.facts.training["losses"]
    assert digests(again) == digests(whole)
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(Stop):
        fit(model, kind, out=tmp_path, on_progress=interrupt, **options)
    steps.clear()
    fit(model, kind, out=tmp_path, on_progress=note, **options, ridge=0.01)  # another run does not go on from it
    assert steps[0] == 1


def test_values_that_are_half_updated_are_not_kept(
    model: PolarModel, tmp_path: Path, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = torch.optim.Adam.step, iter(range(9))

    def interrupted(adam: torch.optim.Adam) -> None:
        step(adam)
        if next(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(model, BRIDGES, out=tmp_path, distil=5)
    assert digests(fit(model, BRIDGES, out=tmp_path, distil=5)) == digests(fit(model, BRIDGES, distil=5))


@both
def test_fitting_goes_on_from_maps_that_are_there(kind: Kind, model: PolarModel, tmp_path: Path, fit: Fit) -> None:
    exact: dict[str, object] = {"storage": "float16"} if kind is FILLS else {}
    first = fit(model, kind, "4-5", out=tmp_path / "first", rank=4, **exact)
    start = {"start": str(tmp_path / "first"), **exact}
    more = fit(model, kind, "2-3" + (";" if kind is BRIDGES else ",") + "4-5", **start)
    read = "" if kind is BRIDGES else ", token rank 2"
    assert [record.form for record in more.facts.segments] == [f"full rank{read}", f"rank 4{read}"]
    assert digests(more)[4, 5] == digests(first)[4, 5]
    assert digests(more)[2, 3] == digests(fit(model, kind, "2-3", **exact))[2, 3]
    trained = fit(model, kind, "4-5", distil=24, rate=5e-4, **start)
    assert trained.facts.training["held_out"][0]["kept"]
    assert digests(trained)[4, 5] != digests(first)[4, 5]
    assert trained.facts.training["start"]["programs"] == first.facts.training["programs"]
    assert str(tmp_path) not in json.dumps(trained.facts.training)  # it is published with the router
    with pytest.raises(MapModelError):
        fit(tiny_model(seed=1, policy=Policy.permissive()), kind, **start)


def test_labels_change_the_training_only_where_they_are_asked_for(model: PolarModel, mixed_items: list[Item]) -> None:
    turned: list[Item] = [
        item.model_copy(update={"answer": (item.answer + 1) % 3}) if isinstance(item, ChoiceItem) else item
        for item in mixed_items
    ]

    def train(items: list[Item], labels: float) -> list[float]:
        options = BridgeOptions(distil=3, labels=labels, answer_tokens=4)
        losses: list[float] = Healer(model, options, items, "2", None, RewardCache()).run().facts.training["losses"]
        return losses

    assert train(mixed_items, 0.0) == train(turned, 0.0)
    assert train(mixed_items, 2.0) != train(turned, 2.0)


def test_the_loss_is_zero_for_identity_and_its_terms_add_up(model: PolarModel, mixed_items: list[Item]) -> None:
    tasks = make_tasks(model, mixed_items[-3:], RewardCache())
    pack = make_packs(model.loaded.decoder, tasks, 4096)[0]
    slots = slots_of(tasks, torch.device("cpu"))
    assert slots is not None

    def predictions(seed: int, base: float | torch.Tensor = 0.0) -> Predictions:
        logits = base + torch.randn(len(pack.targets), 260, generator=torch.Generator().manual_seed(seed))
        return Predictions(logits, logits[:, :48], choice_scores(logits, pack.targets, slots))

    full = predictions(2)
    ours = predictions(3, full.logits)

    def loss(one: Predictions = ours, **weights: float) -> float:
        return float(loss_of(one, full, slots, LossWeights(**weights)))

    assert loss(full, hidden=1, choices=1, temperature=2) == pytest.approx(0, abs=1e-6)
    divergence = loss()
    kl = torch.nn.functional.kl_div(ours.logits.log_softmax(-1), full.logits.softmax(-1), reduction="batchmean")
    assert divergence == pytest.approx(float(kl), rel=1e-4)
    one, other = ((logits / 2).log_softmax(-1) for logits in (ours.logits, full.logits))
    soft = torch.nn.functional.kl_div(one, other, reduction="batchmean", log_target=True)
    assert loss(temperature=2) == pytest.approx(4 * float(soft), rel=1e-4)
    error = (ours.states - full.states).square().mean() / full.states.square().mean()
    assert loss(hidden=0.5) - divergence == pytest.approx(0.5 * float(error), rel=1e-4)
    assert loss(choices=2) - loss(choices=1) == pytest.approx(loss(choices=1) - divergence, rel=1e-4) != 0
    right = [task.item.answer for task in tasks if isinstance(task.item, ChoiceItem)]
    wanted = torch.nn.functional.cross_entropy(_scores_by_hand(ours.logits, pack.targets, tasks) / 0.3,
                                               torch.tensor(right))  # fmt: skip
    assert loss(labels=1) - divergence == pytest.approx(float(wanted), rel=1e-4)


def _scores_by_hand(logits: torch.Tensor, targets: torch.Tensor, tasks: list[Task]) -> torch.Tensor:
    values = iter(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist())
    return torch.tensor(
        [
            [
                sum(next(values) for _ in tail) / characters
                for tail, characters in zip(task.question.continuations, task.characters, strict=True)
            ]
            for task in tasks
        ]
    )


def test_training_by_products_of_bfloat16_takes_the_same_way(
    model: PolarModel, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for pays in (False, True):
        monkeypatch.setattr("polar_sdk.lab.healing.distillation._halves_pay", lambda _, pays=pays: pays)
        losses.append(fit(model, FILLS, distil=8, rate=5e-4).facts.training["losses"])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_the_last_tokens_of_a_prompt_are_not_filled_in_training(model: PolarModel, fit: Fit) -> None:
    """The more of a prompt runs, the less there is to learn, and where all of it runs, nothing."""
    first = [fit(model, FILLS, "2", distil=1, tail=tail).facts.training["losses"][0] for tail in (1, 12)]
    assert first[1] < 0.9 * first[0]
    with pytest.raises(MapError, match="1000"):
        fit(model, FILLS, "2", distil=1, tail=1000)


@both
def test_states_that_do_not_fit_in_memory_are_computed_again(
    kind: Kind, model: PolarModel, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polar_sdk.lab.healing.heal.TRAIN_TOKENS", 64)
    kept = fit(model, kind, distil=12)
    monkeypatch.setattr("polar_sdk.lab.healing.distillation._MAX_KEPT", 20_000)
    again = fit(model, kind, distil=12)
    assert again.facts.training["losses"] == kept.facts.training["losses"]
    assert digests(again) == digests(kept)


def test_candidates_are_cuts_and_the_least_harmful_layers() -> None:
    harms = {layer: 0.01 * (30 - layer) for layer in range(1, 30)}
    cuts = [((first, 29),) for first in (27, 24, 22, 20, 17, 15)]
    assert candidates(harms, 30) == [[cut] for cut in cuts]
    vital = {**harms, 22: 1.0, 28: 2.0}
    assert candidates(vital, 30)[0] == [((27, 29),), ((26, 27), (29, 29))]
    assert candidates(vital, 30)[3] == [((20, 29),), ((18, 21), (23, 27), (29, 29))]
    assert candidates({1: 0.5}, 2) == [[((1, 1),)]]


def test_what_to_fill_is_found_by_measuring(tmp_path: Path, fit: Fit) -> None:
    """A layer whose work no affine map does, and on which answers depend, runs in every program that is found."""
    network = tiny_llama()
    with torch.no_grad():
        network.model.layers[3].mlp.gate_proj.weight *= 20
        network.model.layers[4].self_attn.o_proj.weight *= 30
    model = PolarModel.from_hf(network, tiny_tokenizer(), policy=Policy.permissive(), ledger=None)
    made = fit(model, FILLS, "default", out=tmp_path, tail=2, storage="float16")
    found = MapSet.load(tmp_path).programs
    assert {segment for program in found for segment in program.fills} == set(made.fills)
    assert [program.text for program in found] == ["0-4 (5:2)", "0-3 (4-5:2)", "0-1 (2:2) 3 (4-5:2)"]
    assert fit(model, FILLS, "default", tail=2, storage="float16").programs == found
    with pytest.raises(MapError, match="402 tokens"):
        fit(model, FILLS, "default", tail=400)


@both
def test_a_router_is_saved_with_the_maps_that_its_programs_use_and_with_no_others(
    kind: Kind, model: PolarModel, tmp_path: Path, fit: Fit
) -> None:
    made, program = model.use_maps(fit(model, kind)), Program.parse(kind.program)
    used = {*program.bridges, *program.fills}
    router = fixed_router(model, (Program.identity(DEPTH), program), (0.9,), default_theta=0.2)
    other = fit(model, FILLS if kind is BRIDGES else BRIDGES)
    for maps in ([], [other], [made.only(set(list(made.maps)[:1]))]):
        with pytest.raises(RouterError, match=kind.name):
            save_with_maps(router, tmp_path / "router", maps)
    assert not (tmp_path / "router" / "router.json").exists()
    save_with_maps(router, tmp_path / "router", [other, made])
    (folder,) = map_folders(tmp_path / "router")
    assert set(MapSet.load(folder).maps) == used < set(made.maps)
    served = tiny_model(policy=Policy.permissive(), router=tmp_path / "router")
    assert served.generate("hello " * 9, max_tokens=2).usage.program == program.text


# The command


@both
def test_the_command_fits_and_goes_on_after_ctrl_c(
    kind: Kind, model: PolarModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixed_items: list[Item]
) -> None:
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("polar_sdk.cli.options.load_model", lambda *_, **__: model)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(item.model_dump_json() for item in mixed_items))
    command = ["lab", "heal", "--data", str(data), "--distil", "5", "--set", "rank=4", "--set", "answer_tokens=4"]
    command += ["--set", "labels=0.5"] if kind is BRIDGES else ["--set", "units=4", "--set", "tail=2"]
    calls = 0

    def interrupted(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return loss_of(*args)

    asking = [*command, kind.flag, kind.segments, "--out"]
    with monkeypatch.context() as patch:
        patch.setattr("polar_sdk.lab.healing.distillation.loss_of", interrupted)
        cut = polar(*asking, tmp_path / "cut")
    assert (cut.exit_code, "the same command" in cut.output) == (130, True), cut.output
    again = polar(*asking, tmp_path / "cut", "--json")
    whole = polar(*asking, tmp_path / "whole")
    assert (again.exit_code, whole.exit_code) == (0, 0), again.output
    assert "MB)" in whole.output
    made, facts = MapSet.load(tmp_path / "cut"), json.loads(again.stdout)
    assert digests(made) == digests(MapSet.load(tmp_path / "whole"))
    assert (facts["bytes"], len(facts["segments"])) == (made.bytes, len(made.maps))
    assert facts["segments"][0]["form"] == ("rank 4" if kind is BRIDGES else "rank 4, 4 units, token rank 8")
    for wrong in (
        [kind.flag, "9-12"],
        [kind.flag, kind.segments, "--set", "rank=no"],
        [kind.flag, kind.segments, "--set", "rank"],
        ["--fills", "4", "--segments", "1-2"],
        [],
        [*({"--segments": ["--fills", "4"], "--fills": ["--segments", "1-2"]}[kind.flag])],  # options of the other kind
    ):
        refused = polar(*command, *wrong, "--out", tmp_path / "wrong")
        assert (refused.exit_code, (tmp_path / "wrong").exists()) == (2, False), refused.output
