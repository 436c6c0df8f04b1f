"""Other ways to spend less compute on a prompt, and PoLar's tiers, on one model, the same prompts and this machine.

    python -m benchmarks.methods

Prompts are those of the test split of the package's own and of those that a fit makes; with POLAR_DATA of its sets
as well; what a method has to learn, it learns from the train split. *Tokens kept* are those of full depth's answers
that a method would choose too, given what stands before them; *right* is the share of answers with a known text that
hold it (else the overlap of words); *likeness* is chrF to full depth's answer, written freely. FLOPs are of all
prompts, by the formula; times, `right` and likeness are of prompts with a known answer, one at a time, without drafts.
Full depth answers each of them just before a method does: times are ratios, prompt by prompt. Memory is that of a
process after its first method, since what later ones leave behind adds up.

PoLar's tiers are those of the model's own router; for a model without one, fills in closed form stand for them, with
nothing certified. Each system is a process of its own. Early exit runs in Hugging Face's model in float32, so its
speeds are shown against the same loop at full depth.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import psutil
import torch

from benchmarks.early_exit import EarlyExit
from benchmarks.peers import plain_folder
from benchmarks.results import Figure, Recorder, arguments
from benchmarks.right_answers import rightness
from benchmarks.router_texts import rows
from benchmarks.shorter_prompts import by_bm25, by_lexrank, shortened
from polar_sdk import PolarModel, Policy, Program, lab
from polar_sdk.engine.maps import Fill
from polar_sdk.engine.pack import Question
from polar_sdk.engine.scoring import score_questions
from polar_sdk.lab.evaluation.text_answers import chrf
from polar_sdk.lab.fit.synthetic import long_items
from polar_sdk.lab.healing.packs import make_packs
from polar_sdk.lab.items import AnswerItem, ChoiceItem, PromptItem, builtin_items, data_hash, item_id, split_of
from polar_sdk.lab.program_search.matrix import measured_matrix
from polar_sdk.lab.rewards.cache import RewardCache
from polar_sdk.lab.rewards.measure import Measurer
from polar_sdk.lab.rewards.tasks import make_tasks
from polar_sdk.lab.training.layerwise_training import LayerwiseSettings
from polar_sdk.lab.training.train import RouterTrainer
from polar_sdk.router.base import IdentityRouter, Router, StaticRouter
from polar_sdk.router.learned import LearnedRouter
from polar_sdk.router.map_set import MapFacts, MapRecord, MapSet, stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from polar_sdk.lab.items import Item
    from polar_sdk.request.generation import Generation
    from polar_sdk.serving.drafts import Speculate
    from polar_sdk.usage import UsageRecord

System = Literal["base", "int4", "smaller", "exit"]
_NEW: Final = 32
"""Tokens of an answer."""
_TAIL: Final = 16
"""Last tokens of a prompt that run all layers where it is filled."""
_PER_KIND, _SEED = 80, 41
"""Prompts of each kind that are made, of which those of the test split are drawn, and the seed of those with notes."""
_LEARN: Final = 24
"""Prompts of the train split for whatever has to learn; fills take `_FIT` of them."""
_FIT: Final = 60
_PACK: Final = 2048
"""Tokens of a pack whose states are compared."""
_EXITS: Final = 10
"""Prompts of early exit."""
_SURE: Final = 0.9
_WORDS: Final = {
    "saved": "FLOPs saved",
    "first": "first token",
    "speed": "decode",
    "kept": "tokens kept",
    "right": "right",
    "likeness": "likeness",
    "memory": "memory",
    "training": "training",
}
FULL: Final = "full depth"


@dataclass(frozen=True)
class Method:
    """A way to answer prompts with one model.

    Attributes:
        name: Row of the table.
        router: Chooses the program; None = full depth.
        rewrite: From a prompt to what is asked instead.
        speculate: Whether tokens are drafted.
        training: What it took to make it; None = not known. Unit: seconds.
        promise: What is promised about its answers.
        note: What else there is to know.
    """

    name: str
    router: Router | None = None
    rewrite: Callable[[str], str] = str
    speculate: Speculate = "off"
    training: float | None = 0.0
    promise: str = "none"
    note: str = ""


@dataclass
class Prompts:
    """What every method is measured on.

    Attributes:
        items: All prompts.
        folder: Holds what full depth answers, once its process has run.
    """

    items: list[Item]
    folder: Path
    answers: dict[str, list[int]] = field(default_factory=dict)
    """Full depth's answer by prompt, as token ids."""
    chosen: dict[str, list[int]] = field(default_factory=dict)
    """What full depth chooses at each place of that answer in one pass."""
    written: dict[str, str] = field(default_factory=dict)
    """Full depth's answer by prompt, written freely."""

    @classmethod
    def drawn(cls, count: int, folder: Path) -> Prompts:
        """As many prompts of the test split, evenly over kinds; those with a known answer count four times."""
        kinds: defaultdict[str, list[Item]] = defaultdict(list)
        for item in [*builtin_items(), *long_items(_PER_KIND, seed=_SEED), *_of_data()]:
            if split_of(item_id(item)) == "test":
                kinds[f"{item.task} {isinstance(item, AnswerItem)}"].append(item)
        lots: list[list[Item]] = []
        for found in sorted(kinds.values(), key=_turns, reverse=True):
            lots += [found[turn :: _turns(found)] for turn in range(_turns(found))]
        dealt = [item for turn in zip_longest(*lots) for item in turn if item is not None]
        prompts = cls(dealt[:count], folder)
        if (folder / "full.json").is_file():
            prompts.answers, prompts.chosen, prompts.written = json.loads((folder / "full.json").read_text())
        return prompts

    @property
    def known(self) -> list[AnswerItem]:
        """The prompts with a known answer."""
        return [item for item in self.items if isinstance(item, AnswerItem)]

    def keep(self) -> None:
        """Write what full depth answers."""
        (self.folder / "full.json").write_text(json.dumps([self.answers, self.chosen, self.written]))


def _turns(found: Sequence[Item]) -> int:
    return 4 if isinstance(found[0], AnswerItem) else 1


def _of_data() -> list[Item]:
    """Facts, passages with a question and texts to summarise, where POLAR_DATA has them."""
    facts = rows("trivia.train", 2 * _PER_KIND)
    passages = [row | {"asked": f"Question: {row['question']}?"} for row in rows("passages.train", 4 * _PER_KIND)]
    summary = "Summarise this text in two sentences:\n\n"
    return [
        *(AnswerItem(prompt=row["question"], answer=row["answer"], task="facts") for row in facts),
        *(PromptItem(prompt=f"{row['passage']}\n\n{row['asked']}", task="passage") for row in passages[::2]),
        *(PromptItem(prompt=summary + row["passage"], task="summaries") for row in passages[1::2]),
    ]


def _text(item: Item) -> str:
    assert not isinstance(item, ChoiceItem)
    return item.prompt


@dataclass(frozen=True)
class Bench:
    """Measures methods on one model."""

    model: PolarModel
    prompts: Prompts

    def answer_all(self) -> None:
        """Make full depth's answers the reference."""
        asked = list(map(_text, self.prompts.items))
        answers = self.model.greedy_answers(asked, max_tokens=_NEW)
        self.prompts.answers = {prompt: list(answer) for prompt, answer in zip(asked, answers, strict=True)}
        self.prompts.chosen = self._choices(asked, [Program.identity(self.model.depth)] * len(asked), asked)

    def row(self, method: Method, *, other_weights: bool = False, tokens_compare: bool = True) -> dict[str, Any]:
        """The figures of a method.

        Args:
            method: What to measure.
            other_weights: Whether it runs other weights than the reference.
            tokens_compare: Whether the model's tokens are those of the reference.
        """
        asked = list(map(_text, self.prompts.items))
        given = [method.rewrite(prompt) for prompt in asked]
        router = method.router or IdentityRouter(self.model.depth)
        routes = [router.route(self.model.prompt_tokens(prompt)) for prompt in given]
        programs = [route.program for route in routes]
        spent = sum(
            self._cost(prompt, program, len(self.prompts.answers[own])) + route.flops
            for prompt, program, route, own in zip(given, programs, routes, asked, strict=True)
        )
        facts = self._free(method, router)
        if other_weights:  # full depth of these is not what they are compared with
            del facts["first_ratio"], facts["speed_ratio"]
        row = {"row": method.name, "spent": spent * facts.pop("executed"), **facts}
        if method.training is not None:
            row["training"] = method.training
        if tokens_compare:
            ours = self._choices(given, programs, asked)
            shares = [_share(ours[prompt], self.prompts.chosen[prompt]) for prompt in asked]
            row["kept"] = 100 * fmean(shares)
        row["note"] = "; ".join(filter(None, [f"promise: {method.promise}", method.note]))
        return row

    def _cost(self, prompt: str, program: Program, answer: int) -> int:
        return self.model.decoder.cost.request(program, len(self.model.prompt_tokens(prompt)), answer).total

    def _choices(self, given: list[str], programs: list[Program], asked: list[str]) -> dict[str, list[int]]:
        """What a program chooses at each place of full depth's answer, by the prompt that was asked."""
        found = dict[str, list[int]]()
        for program in dict.fromkeys(programs):
            rows = [row for row, other in enumerate(programs) if other == program]
            questions = [
                Question(tuple(self.model.prompt_tokens(given[row])), (tuple(self.prompts.answers[asked[row]]),))
                for row in rows
            ]
            scores = score_questions(self.model.decoder, questions, program)
            found |= {asked[row]: list(score.greedy[0]) for row, score in zip(rows, scores, strict=True)}
        return found

    def _free(self, method: Method, router: Router) -> dict[str, float]:
        """Figures of answers that are written one at a time; each has a tenant, so that no start is shared."""
        full, host = self._host(IdentityRouter(self.model.depth)), self._host(router)
        alone: dict[str, Any] = {"max_tokens": _NEW, "speculate": "off"}
        first, speed, right, like = list[_Paired](), list[_Paired](), list[float](), list[float]()
        needed = executed = 0
        for place, item in enumerate([self.prompts.known[0], *self.prompts.known]):  # the first one warms up
            exact = full.generate(item.prompt, tenant=f"{FULL} beside {method.name} {place}", **alone)
            options = alone | {"speculate": method.speculate}
            answer = host.generate(method.rewrite(item.prompt), tenant=f"{method.name} {place}", **options)
            if not place:
                continue
            if method.name == FULL:
                self.prompts.written[item.prompt] = answer.text
            first.append(_Paired(_first_ms(answer.usage), _first_ms(exact.usage)))
            if min(len(answer.token_ids), len(exact.token_ids)) > 1:
                speed.append(_Paired(_tokens_a_second(answer), _tokens_a_second(exact)))
            needed, executed = needed + answer.usage.flops.total, executed + answer.usage.flops.executed
            right.append(rightness(answer.text, item.answer))
            like.append(chrf(answer.text, self.prompts.written[item.prompt]))
        return {
            "first": median(pair.ours for pair in first),
            "first_ratio": median(pair.ratio for pair in first),
            "speed": median(pair.ours for pair in speed),
            "speed_ratio": median(pair.ratio for pair in speed),
            "right": 100 * fmean(right),
            "likeness": 100 * fmean(like),
            "executed": executed / needed,
        }

    def _host(self, router: Router) -> PolarModel:
        return PolarModel(self.model.loaded, policy=Policy(), router=router, ledger=None)


class _Paired(NamedTuple):
    """The same of a method and of full depth, one just after the other."""

    ours: float
    full: float

    @property
    def ratio(self) -> float:
        return self.ours / self.full


def _first_ms(usage: UsageRecord) -> float:
    return (usage.queue_ns + usage.prefill_ns) / 1e6


def _tokens_a_second(answer: Generation) -> float:
    return (len(answer.token_ids) - 1) / answer.usage.decode_ns * 1e9


def _share(ours: Sequence[int], theirs: Sequence[int]) -> float:
    return fmean(one == other for one, other in zip(ours, theirs, strict=True))


def base_methods(model: PolarModel, folder: Path) -> Iterator[Method]:
    """The methods that run the model's own weights."""
    yield Method(FULL)
    yield Method("prompt-lookup drafts", speculate="prompt", promise="the same answer")
    yield from _without_layers(model)
    yield _untrained(model)
    for name, library, pick in (("LexRank", "sumy", by_lexrank), ("BM25", "bm25s", by_bm25)):
        if importlib.util.find_spec(library) is not None:
            yield Method(f"half of the sentences, {name}", rewrite=partial(shortened, share=0.5, pick=pick))
    yield _policy_router(model, folder)
    router = model.router
    yield from _tiers(router) if isinstance(router, LearnedRouter) and router.certified else _fills(model)


def _learnt(count: int) -> list[Item]:
    """Prompts of the train split of the package's own, over all kinds."""
    return [item for item in builtin_items() if split_of(item_id(item)) == "train"][:count]


def _without_layers(model: PolarModel) -> Iterator[Method]:
    """The layers that turn states least (ShortGPT's block influence) are left out for every prompt."""
    begin = time.perf_counter()
    tasks = make_tasks(model, _learnt(_LEARN), RewardCache(), answer_tokens=_NEW)
    turned = torch.zeros(model.depth)
    with torch.inference_mode():
        for pack in make_packs(model.decoder, tasks, _PACK):
            before = torch.zeros(())
            for layer, states in pack.states(model.decoder, model.depth - 1):
                after = states.float()
                if layer:
                    turned[layer - 1] += (1 - torch.cosine_similarity(before, after)).sum()
                before = after.clone()
    free = model.policy.free(model.depth)
    ranked = sorted(free, key=lambda layer: float(turned[layer]))
    took = time.perf_counter() - begin
    for count in (model.depth // 12, model.depth // 5):
        program = Program.skipping(model.depth, ranked[:count])
        yield Method(f"{count} layers left out", StaticRouter(program), training=took, note=program.text)


def _untrained(model: PolarModel) -> Method:
    """Above a cut, keys and values of prompt tokens are the layers' own, of the state at the cut (POP's idea)."""
    segment = _cut(model, 0.3)
    fill = own_keys_values(model, segment)
    facts = MapFacts(
        kind="fill",
        model=model.name,
        fingerprint=model.fingerprint,
        dtype=model.dtype,
        storage="exact",
        segments=(MapRecord.of(segment, fill, None),),
        data="",
        training={},
    )
    model.use_maps(MapSet(facts, stored({segment: fill}, "exact")))
    program = Program.filling(model.depth, [segment], _TAIL)
    return Method("prompt not run above a cut, untrained", StaticRouter(program), note=program.text)


def own_keys_values(model: PolarModel, segment: tuple[int, int]) -> Fill:
    """A fill that writes what each layer of a segment itself makes of the state at its entry: that is affine in it."""
    decoder = model.decoder
    width = decoder.family.hidden
    # The state of unit i alone, and none at all: after the norm it is √E, so that its row of the map is read off.
    probes = torch.cat((torch.eye(width), torch.zeros(1, width))).to(decoder.dtype)
    weights, biases = list[torch.Tensor](), list[torch.Tensor]()
    with torch.inference_mode():
        for layer in range(segment[0], segment[1] + 1):
            read = torch.stack(decoder.keys_values(layer, probes), 1).float()  # (E + 1, 2, G, d)
            biases.append(read[-1])
            weights.append(((read[:-1] - read[-1]) / math.sqrt(width)).flatten(1))
    return Fill((torch.cat(weights, 1),), torch.stack(biases)).to(decoder.dtype, decoder.device)


def _cut(model: PolarModel, share: float) -> tuple[int, int]:
    return model.depth - round(share * model.depth), model.depth - 1


def _policy_router(model: PolarModel, folder: Path) -> Method:
    """The article's router, trained by policy gradient on a small lot of short prompts."""
    begin = time.perf_counter()
    cache = RewardCache(folder / "policy.sqlite3")
    items = [item for item in _learnt(4 * _LEARN) if len(model.prompt_tokens(_text(item))) <= 100][:_LEARN]
    tasks = make_tasks(model, items, cache, answer_tokens=_NEW)
    splits: list[Any] = ["dev" if place % 4 == 3 else "train" for place in range(len(tasks))]
    identity = [Program.identity(model.depth)]
    options: dict[str, Any] = {"splits": splits, "data": data_hash(items), "write_tokens": None}
    matrix = measured_matrix(Measurer(model, cache), tasks, identity, **options)
    settings = LayerwiseSettings(epochs=4, batch=12, samples=3)
    router = RouterTrainer(model, matrix).layerwise(items, settings, cache=cache)
    note = f"{len(tasks)} prompts, {settings.epochs} epochs"
    return Method("the article's policy router", router, training=time.perf_counter() - begin, note=note)


def _fills(model: PolarModel) -> Iterator[Method]:
    """PoLar's fills in closed form, for want of a router."""
    cuts = [_cut(model, share) for share in (0.3, 0.5)]
    begin = time.perf_counter()
    lab.heal(model, _learnt(_FIT), ",".join(str(first) for first, _ in cuts), kind="fill")
    took = time.perf_counter() - begin
    for cut in cuts:
        program = Program.filling(model.depth, [cut], _TAIL)
        yield Method(f"PoLar's fills from layer {cut[0]}", StaticRouter(program), training=took, note=program.text)


def _tiers(router: LearnedRouter) -> Iterator[Method]:
    """The tiers of a certified router."""
    assert router.certificate is not None
    seconds = router.facts.training.get("seconds")
    for tier, promise in router.certificate.tiers.items():
        if promise.setting.text:
            yield Method(f"PoLar, {tier}", router.at(promise.setting), training=seconds, promise=promise.text)


def early_exit(model: PolarModel, prompts: Prompts) -> dict[str, Any]:
    """The figures of early exit, on some of the prompts, along full depth's answers."""
    layer = model.depth * 2 // 3
    peer = EarlyExit(plain_folder(model), layer)
    asked = [(item, model.prompt_tokens(item.prompt)) for item in prompts.known[:_EXITS]]
    cost = model.decoder.cost
    above = cost.layers[layer:]
    exits = steps = spent = 0
    firsts, speeds = list[_Paired](), list[_Paired]()
    shares, right, like = list[float](), list[float](), list[float]()
    for item, tokens in asked:
        answer = prompts.answers[item.prompt]
        plain = peer.answer(tokens, len(answer), 2.0, answer)
        forced = peer.answer(tokens, len(answer), _SURE, answer)
        free = model.decode(peer.answer(tokens, _NEW, _SURE).chosen)
        shares.append(_share(forced.chosen, plain.chosen))
        right.append(rightness(free, item.answer))
        like.append(chrf(free, prompts.written[item.prompt]))
        firsts.append(_Paired(1_000 * forced.first, 1_000 * plain.first))
        if len(answer) > 1:
            speeds.append(_Paired((len(answer) - 1) / forced.rest, (len(answer) - 1) / plain.rest))
        exits, steps = exits + forced.exits, steps + len(answer) - 1
        # A token that stops leaves keys and values above; the head was asked for all tokens, and again for the others.
        keys = len(tokens) + len(answer) // 2
        left_out = sum(each.linear - each.keys_values + each.attention * keys for each in above)
        whole = cost.request(Program.identity(model.depth), len(tokens), len(answer)).total
        spent += whole + cost.head * (len(answer) - 1 - forced.exits) - left_out * forced.exits
    full = sum(
        cost.request(Program.identity(model.depth), len(tokens), len(prompts.answers[item.prompt])).total
        for item, tokens in asked
    )
    return {
        "row": f"early exit after {layer} layers",
        "saved": 100 * (1 - spent / full),
        "first": median(pair.ours for pair in firsts),
        "first_ratio": median(pair.ratio for pair in firsts),
        "speed": median(pair.ours for pair in speeds),
        "speed_ratio": median(pair.ratio for pair in speeds),
        "kept": 100 * fmean(shares),
        "right": 100 * fmean(right),
        "likeness": 100 * fmean(like),
        "training": 0.0,
        "note": f"promise: none; Hugging Face, float32, {len(asked)} prompts; {exits} of {steps} tokens stop early",
    }


def measure(system: System, options: argparse.Namespace) -> None:
    """Measure one system in this process, a row of JSON per method."""
    prompts = Prompts.drawn(options.prompts, options.folder)
    load: dict[str, Any] = {"ledger": None, "speculate": "off"}

    shown: list[str] = []

    def show(row: dict[str, Any]) -> None:
        if not shown:
            row |= {"memory": psutil.Process().memory_info().rss / 1e6}
        shown.append(row["row"])
        print(json.dumps(row), flush=True)

    if system == "smaller":
        model = PolarModel.from_pretrained(options.smaller, router=None, **load)
        show(
            Bench(model, prompts).row(Method(f"{model.name}, {model.dtype}"), other_weights=True, tokens_compare=False)
        )
        return
    model = PolarModel.from_pretrained(options.model, precision="int4" if system == "int4" else "auto", **load)
    bench = Bench(model, prompts)
    if system == "exit":
        show(early_exit(model, prompts))
    elif system == "int4":
        show(bench.row(Method("int4"), other_weights=True))
    else:
        bench.answer_all()
        for method in base_methods(model, options.folder):
            show(bench.row(method))
            prompts.keep()


def main() -> None:
    """Measure all systems, each in a process of its own, and record the figures."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--smaller", default="smollm2-135m-instruct", help="what a user may take instead")
    parser.add_argument("--prompts", type=int, default=72)
    parser.add_argument("--folder", type=Path, default=Path("out/methods"), help="for what the systems share")
    parser.add_argument("--system", choices=["base", "int4", "smaller", "exit"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.system:
        measure(options.system, options)
        return
    (options.folder / "full.json").unlink(missing_ok=True)
    recorder, full = Recorder("methods", options.results), dict[str, Any]()
    for system in ("base", "int4", "smaller", "exit"):
        command = [sys.executable, "-m", "benchmarks.methods", *sys.argv[1:], "--system", system]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                row = json.loads(line)
                full = full or row
                record(recorder, row, full)
        if process.returncode:
            raise SystemExit(f"{system} failed with exit code {process.returncode}")
    print(table(recorder.figures))


def table(figures: Sequence[Figure]) -> str:
    """The figures as a table in Markdown, as `docs/results.md` shows it."""
    rows: dict[str, dict[str, Figure]] = {}
    for figure in figures:
        row, _, column = figure.name.rpartition(": ")
        rows.setdefault(row, {})[column] = figure
    columns = [f"{words}, {_unit(column)}" for column, words in _WORDS.items()]
    lines = [f"| method | {' | '.join(columns)} | notes |", f"|{' --- |' * (len(columns) + 2)}"]
    for row, found in rows.items():
        cells = [_cell(found.get(words)) for words in _WORDS.values()]
        lines.append(f"| {row} | {' | '.join(cells)} | {found[_WORDS['saved']].note} |")
    return "\n".join(lines)


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "–"
    return f"{figure.value:,g}" + ("" if figure.ratio is None else f" ({figure.ratio:.2f}×)")


def _unit(column: str) -> str:
    return {"first": "ms", "speed": "tokens/s", "memory": "MB", "training": "s"}.get(column, "%")


def record(recorder: Recorder, row: dict[str, Any], full: dict[str, Any]) -> None:
    """Record the figures of a row, times beside those of full depth."""
    if "saved" not in row:
        row["saved"] = 100 * (1 - row["spent"] / full["spent"])
    for column, words in _WORDS.items():
        if column not in row:
            continue
        facts: dict[str, Any] = {"note": row["note"] if column == "saved" else None}
        if column in ("first", "memory"):
            facts["better"] = "lower"
        if column in ("first", "speed"):
            facts |= {"peer": FULL, "ratio": row.get(f"{column}_ratio", row[column] / full[column])}
        recorder.add(f"{row['row']}: {words}", float(row[column]), _unit(column), **facts)


if __name__ == "__main__":
    main()
