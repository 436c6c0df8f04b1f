"""What tiers and fixed programs save and keep on prompts of over 500 tokens, more than `train_router`'s test split has.

    POLAR_DATA=FOLDER python -m benchmarks.long_texts [--per-kind 80]

Prompts are made as those of the router are, and are none of those; and notes that are longer than any of them.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.results import RESULTS, Recorder
from benchmarks.router_seeds import record_part
from benchmarks.router_texts import texts
from polar_sdk import PolarModel, lab
from polar_sdk.lab.evaluation.texts import LENGTHS, TextRun
from polar_sdk.lab.items import ChoiceItem, PromptItem, distinct_items, item_id
from polar_sdk.lab.notes import notes
from polar_sdk.lab.training.measuring import Bench
from polar_sdk.router.menu import MenuRouter

if TYPE_CHECKING:
    from polar_sdk.lab.items import Item

_FROM: Final = LENGTHS["over_500"][0]
"""Unit: tokens."""
_ROUTED: Final = 100
"""Prompts of each kind that `train_router` takes."""
_FEWEST: Final = 20
"""Prompts of a kind that is shown by itself."""
_SEED: Final = 31


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-kind", type=int, default=80)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    model = PolarModel.from_pretrained(ledger=None)
    recorder = Recorder("long-texts", args.results)
    prompts = _prompts(model, args.per_kind)
    evaluation = lab.evaluate(model, {"long": prompts}, timed=0).plain()
    for tier in ("standard", "economy"):  # premium and exact run such prompts at full depth
        whole = evaluation["texts"][tier]
        kinds = {kind: part for kind, part in whole["by_kind"].items() if part["prompts"] >= _FEWEST}
        for name, part in {"all": whole, **kinds}.items():
            record_part(recorder, f"{tier}, {name}", part, topic="long-texts")
    for program, part in _programs(model, prompts).items():
        record_part(recorder, program, part, topic="long-texts")
    for figure in recorder.run.figures:
        bounds = "" if figure.low is None else f" ({figure.low:.1f} to {figure.high:.1f})"
        print(f"{figure.name}: {figure.value:.1f}%{bounds}, {figure.note}")
    print("\n".join(evaluation["verdict"]))
    print(f"wrote {recorder.path}")


def _prompts(model: PolarModel, per_kind: int) -> list[Item]:
    """Prompts that are long enough, at most so many of each kind."""
    used = {item_id(item) for item in texts("route", _ROUTED)}
    longer = notes(per_kind, seed=_SEED, facts=(25, 40))
    made: list[Item] = [PromptItem(prompt=text.prompt, task="longer notes") for text in longer]
    made += [item for item in texts("route", _ROUTED + 2 * per_kind) if item_id(item) not in used]
    kinds: dict[str, list[Item]] = defaultdict(list)
    for item in distinct_items(made):
        if not isinstance(item, ChoiceItem) and len(model.prompt_tokens(item.prompt)) >= _FROM:
            kinds[str(item.task)].append(PromptItem(prompt=item.prompt, task=item.task))
    return [item for items in kinds.values() for item in items[:per_kind]]


def _programs(model: PolarModel, prompts: list[Item]) -> dict[str, dict[str, Any]]:
    """Figures of each program of the menu that only fills, run for every prompt."""
    router = model.router
    assert isinstance(router, MenuRouter)
    programs = [program for program in router.programs if program.fills and not program.bridges]
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
