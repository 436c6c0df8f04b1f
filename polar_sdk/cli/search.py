"""`polar lab search`: search programs at several budgets, and pick the menu that a router is trained on."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polar_sdk import lab
from polar_sdk.cli import options as opt
from polar_sdk.show.lines import print_line
from polar_sdk.show.progress import ProgressBars, interruptible

if TYPE_CHECKING:
    from polar_sdk.lab.program_search.menu import Menu


@opt.with_lab_model
def search(
    out: Annotated[Path, typer.Option(help="Menu file to write; the rewards are written next to it.")],
    data: opt.Data = None,
    limit: opt.Limit = None,
    budgets: Annotated[str, typer.Option(help="FLOPs of the programs, as shares of full depth's.")] = "0.9,0.8,0.7,0.6",
    menu: Annotated[int, typer.Option(min=2, help="Maximum number of programs on the menu, full depth included.")] = 12,
    maps: opt.Maps = None,
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts to evolve programs on.")] = 128,
    train: Annotated[int, typer.Option(min=1, help="Maximum number of train prompts to measure the menu on.")] = 1000,
    population: Annotated[int, typer.Option(min=1, help="Programs tried per generation and budget.")] = 12,
    generations: Annotated[int, typer.Option(min=0, help="Generations per budget, after the first.")] = 4,
    objective: Annotated[
        Literal["identity", "labels"], typer.Option(help="Answer like full depth, or prefer the right choice.")
    ] = "identity",
    loops: Annotated[bool, typer.Option(help="Also try layers visited twice.")] = True,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of full depth's answers to prompts.")] = 24,
    write_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum tokens of answers checked against the right text.")
    ] = 64,
    cached: Annotated[bool, typer.Option("--cache/--no-cache", help="Keep measurements for the next run.")] = True,
    seed: opt.Seed = None,
    as_json: opt.AsJson = False,
    *,
    load: opt.Load,
) -> None:
    """Search programs on prompts; an interrupted search resumes where it stopped."""
    from polar_sdk.lab.rewards.cache import RewardCache, cache_path

    options: dict[str, Any] = {
        "budgets": opt.numbers("--budgets", budgets, float, "0.9,0.8,0.7"),
        "menu": menu,
        "prompts": prompts,
        "train": train,
        "population": population,
        "generations": generations,
        "objective": objective,
        "loops": loops,
        "answer_tokens": answer_tokens,
        "write_tokens": write_tokens,
        "seed": seed or 0,
    }
    lab.SearchOptions(**options)  # checks them before seconds are spent on loading the model
    items = opt.items_of(data, limit)
    engine = load()
    loaded = [engine.use_maps(folder) for folder in maps or ()]
    filling = [program for each in loaded if each.facts.kind == "fill" for program in each.programs]
    cache = RewardCache(cache_path(engine.fingerprint, engine.dtype) if cached else None)
    kept = interruptible("measurements are kept; the same command resumes from there") if cached else nullcontext()
    with kept, cache, ProgressBars(quiet=as_json) as show:
        result = lab.search(engine, items, programs=filling, cache=cache, on_progress=show, **options)
    rewards = result.save(out)
    if as_json:
        typer.echo(
            json.dumps({**result.menu.model_dump(mode="json"), "out": str(out), "rewards": str(rewards)}, indent=2)
        )
    else:
        _show(result.menu, out, rewards)


def _show(menu: Menu, out: Path, rewards: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "program", "FLOPs", "agreement", "tokens", "accuracy", title="Menu")
    for index, row in enumerate(menu.programs):
        table.add_row(
            str(index),
            row.program.text,
            f"{row.flops_ratio:.1%}",
            f"{row.agreement:.1%}",
            f"{row.token_agreement:.1%}",
            "–" if row.accuracy is None else f"{row.accuracy:.1%}",
        )
    console = Console(markup=False)
    console.print(table)
    split = ", ".join(f"{count} {name}" for name, count in menu.prompts.items())
    console.print(f"{menu.tried} programs measured; prompts: {split}")
    print_line(f"wrote {out} and {rewards}")
