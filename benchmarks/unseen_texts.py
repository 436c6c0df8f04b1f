"""What tiers save and keep on texts that nothing has seen: long prompts, and tasks that calibration did not have.

    POLAR_DATA=FOLDER python -m benchmarks.unseen_texts [--only long|kinds] [--per-kind 80]

Long prompts are of over 500 tokens, made as those of the router are, and are none of those, though a passage may stand
in one of theirs too; and notes that are longer than any of them. Kinds are tasks that the router was neither trained
nor calibrated on, and comparisons, about passages of none of the prompts that it or its maps were made with, as many of
each as there are passages for.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.results import RESULTS, Recorder
from benchmarks.router_seeds import record_part
from benchmarks.router_texts import (
    COMPARISON,
    FITTED,
    ROUTED,
    filling,
    route_texts,
    tasks_about,
    texts,
    unused_passages,
)
from polar_sdk import PolarModel, lab
from polar_sdk.lab.evaluation.texts import LENGTHS, TextRun
from polar_sdk.lab.items import ChoiceItem, PromptItem, distinct_items, item_id, split_of
from polar_sdk.lab.notes import notes
from polar_sdk.lab.training.measuring import Bench

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_sdk.lab.items import Item

_FROM: Final = LENGTHS["over_500"][0]
"""Unit: tokens."""
_FEWEST: Final = 20
"""Prompts of a kind that is shown by itself."""
_SEED: Final = 31
_TIERS: Final = ("standard", "economy")
"""Premium runs nearly all texts at full depth."""
_TASKS: Final = {
    "questions": ("{text}\n\nWrite three questions that this text answers.",),
    "tone": ("{text}\n\nIs the tone of this text positive, negative or neutral? Explain in one sentence.",),
    "keywords": ("Give five keywords for this text, separated by commas:\n\n{text}",),
    "contradiction": ("{text}\n\n***\n\n{other}\n\nDo these two statements contradict each other?",),
    "merging": ("Merge these two notes into one paragraph.\n\nNote one: {text}\n\nNote two: {other}",),
    "comparison (not new)": COMPARISON["comparison"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["long", "kinds"])
    parser.add_argument("--per-kind", type=int, default=80)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    model = PolarModel.from_pretrained(ledger=None)
    sets: dict[str, Callable[[PolarModel, int], list[Item]]] = {"long": _long, "kinds": _kinds}
    for name, make in sets.items():
        if args.only in (None, name):
            prompts = make(model, args.per_kind)
            if not prompts:
                sys.exit("error: there are no passages; let POLAR_DATA name a folder with passages.train.jsonl.")
            topic = {"long": "long-texts", "kinds": "unseen-tasks"}[name]
            _record(Recorder(topic, args.results), model, prompts, programs=name == "long")


def _record(recorder: Recorder, model: PolarModel, prompts: list[Item], *, programs: bool) -> None:
    """Figures of the tiers on all of the prompts and by kind, and of programs that run for all of them."""
    evaluation = lab.evaluate(model, {recorder.run.topic: prompts}, timed=0).plain()
    for tier in _TIERS:
        whole = evaluation["texts"][tier]
        kinds = {kind: part for kind, part in whole["by_kind"].items() if part["prompts"] >= _FEWEST}
        for name, part in {"all": whole, **kinds}.items():
            record_part(recorder, f"{tier}, {name}", part, topic=recorder.run.topic)
    for program, part in (_programs(model, prompts) if programs else {}).items():
        record_part(recorder, program, part, topic=recorder.run.topic)
    for figure in recorder.run.figures:
        bounds = "" if figure.low is None else f" ({figure.low:.1f} to {figure.high:.1f})"
        print(f"{figure.name}: {figure.value:.1f}%{bounds}, {figure.note}")
    print("\n".join(evaluation["verdict"]))
    print(f"wrote {recorder.path}")


def _long(model: PolarModel, per_kind: int) -> list[Item]:
    """Prompts that are long enough, at most so many of each kind."""
    used = {item_id(item) for item in texts("route", ROUTED)}
    longer = notes(per_kind, seed=_SEED, facts=(25, 40))
    made: list[Item] = [PromptItem(prompt=text.prompt, task="longer notes") for text in longer]
    made += [item for item in texts("route", ROUTED + 2 * per_kind) if item_id(item) not in used]
    kinds: dict[str, list[Item]] = defaultdict(list)
    for item in distinct_items(made):
        if not isinstance(item, ChoiceItem) and len(model.prompt_tokens(item.prompt)) >= _FROM:
            kinds[str(item.task)].append(PromptItem(prompt=item.prompt, task=item.task))
    return [item for items in kinds.values() for item in items[:per_kind]]


def _kinds(_: PolarModel, per_kind: int) -> list[Item]:
    """Prompts of every task, as many of each as there are passages for."""
    fitted = texts("fit", FITTED)
    used = [item for item in route_texts(fitted) if split_of(item_id(item)) != "test"]
    return tasks_about(unused_passages([*fitted, *used]), _TASKS, per_kind)


def _programs(model: PolarModel, prompts: list[Item]) -> dict[str, dict[str, Any]]:
    """Figures of each program of the menu that only fills, run for every prompt."""
    programs = filling(model.router)
    bench = Bench(model)
    tasks = bench.tasks(prompts)
    outcomes, floor = bench.outcomes(tasks, programs), bench.again(tasks)
    full = [outcome.flops for outcome in outcomes.all([outcomes.matrix.programs[0]] * len(tasks))]
    lengths = [len(task.question.prompt) for task in tasks]
    figures = {}
    for program in programs:
        found = outcomes.all([program] * len(tasks))
        run = TextRun(found, [outcome.flops for outcome in found], full, floor, lengths, [""] * len(tasks))
        figures[program.text] = run.figures(range(len(tasks))).model_dump()
    return figures


if __name__ == "__main__":
    main()
