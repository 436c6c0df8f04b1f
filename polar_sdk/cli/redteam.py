"""`polar redteam`: attempts to make a tier break its promise, without and with defences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polar_sdk import lab
from polar_sdk.cli import options as opt
from polar_sdk.request.selection import DEFAULT_SHARE
from polar_sdk.show.lines import print_line
from polar_sdk.show.progress import ProgressBars, interruptible
from polar_sdk.show.tables import add_numbers, add_row, new_table, show

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polar_sdk.lab import RedTeam
    from polar_sdk.lab.redteam.attack import RedTeamPlan


@opt.with_lab_model
def redteam(
    data: Annotated[
        Path | None, typer.Option(help="JSONL of real prompts to start from; default: the package's own.")
    ] = None,
    attempts: Annotated[
        int, typer.Option(min=1, max=100_000, help="Number of attempts, without defences and again with them.")
    ] = 500,
    tries: Annotated[
        int, typer.Option(min=1, max=24, help="Versions of a prompt per attempt; each takes a second.")
    ] = 2,
    seeds: Annotated[int, typer.Option(min=4, help="Number of real prompts to measure first.")] = 100,
    audits: Annotated[float, typer.Option(min=0, max=1, help="Share of requests that are audited.")] = DEFAULT_SHARE,
    router: Annotated[Path | None, typer.Option(help="Folder of the router; default: the model's.")] = None,
    seed: opt.Seed = None,
    as_json: opt.AsJson = False,
    *,
    load: opt.Load,
) -> None:
    """Search for prompts that look easy to the router but need depth, and count those that break a tier's promise.

    Floors and margin are those of --policy. After Ctrl-C, the same command resumes where it stopped.
    """
    items = None if data is None else lab.read_items(data)
    model = load(router=router)

    def show_plan(plan: RedTeamPlan) -> None:
        for line in plan.lines if not as_json else ():
            print_line(line)

    with interruptible(), ProgressBars(quiet=as_json) as progress:
        found = lab.redteam(
            model,
            items,
            attempts=attempts,
            tries=tries,
            seeds=seeds,
            audit_share=audits,
            seed=seed or 0,
            on_plan=show_plan,
            on_progress=progress,
        )
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
        return
    table = new_table(f"Attempts that broke the promise, of {found.attempts}", ["tier"])
    add_numbers(table, "promised", "ordinary", "without", *found.defences, "all", "fewer", "strict", "strict, all")
    for row in _rows(found):
        add_row(table, *row)
    show(table)
    for tier in found.tiers:
        broke = ", ".join(f"{method} {count}" for method, count in tier.by_method.items()) or "none"
        print_line(f"{tier.tier}: without defences, of {found.attempts} attempts, by method: {broke}")


def _rows(found: RedTeam) -> Iterator[tuple[str, ...]]:
    for tier in found.tiers:
        yield (
            tier.tier,
            f"{tier.alpha:.1%}",
            f"{tier.ordinary.value:.1%}",
            str(tier.without),
            *(str(tier.alone[defence]) for defence in found.defences),
            str(tier.defended),
            "–" if tier.fewer is None else f"{tier.fewer:.0%}",
            str(tier.strict_without),
            str(tier.strict_defended),
        )
