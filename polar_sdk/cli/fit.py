"""`polar fit`: a certified router for any model, in one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polar_sdk import lab
from polar_sdk.cli import options as opt
from polar_sdk.cli.calibrate import promise_of
from polar_sdk.show.lines import print_line
from polar_sdk.show.progress import ProgressBars, interruptible

if TYPE_CHECKING:
    from polar_sdk.lab.fit.plan import Plan


@opt.with_lab_model
def fit(
    model: Annotated[
        str | None, typer.Argument(help="Alias, hub id, folder or .gguf file; default: the default model.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="JSONL of prompts like those you serve; repeatable; default: the package's own."),
    ] = None,
    hours: Annotated[float, typer.Option(min=0.01, max=1000, help="Time to plan for, on this machine.")] = 1.0,
    promise: Annotated[
        list[str] | None,
        typer.Option(
            help="What a tier promises, written as for polar lab calibrate, e.g. economy=0.1:strict=0.5, or "
            "standard=0.05:drops where the data has right answers; repeatable."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of prompts, whatever the hours allow.")
    ] = None,
    distil: Annotated[
        int | None, typer.Option(min=0, help="Training steps of the maps; default: as many as the hours allow.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Working folder; default: one in the cache.")] = None,
    seed: opt.Seed = None,
    as_json: opt.AsJson = False,
    *,
    load: opt.Load,
) -> None:
    """Fit maps, choose programs, train and certify a router, and register it for everyone who loads this model.

    The plan is printed first. After Ctrl-C, the same command resumes where it stopped.
    """
    from polar_sdk.lab.evaluation.rendering import require_report

    require_report()
    promises = dict(promise_of("--promise", text) for text in promise) if promise else None
    items = [item for path in data for item in lab.read_items(path)] if data else None
    engine = load()

    def show_plan(plan: Plan) -> None:
        for line in plan.lines if not as_json else ():
            print_line(line)

    with interruptible(), ProgressBars(quiet=as_json) as show:
        made = lab.fit(
            engine,
            items,
            hours=hours,
            promises=promises,
            out=out,
            limit=limit,
            distil=distil,
            seed=seed or 0,
            on_plan=show_plan,
            on_progress=show,
        )
    if as_json:
        registered = None if made.registered is None else str(made.registered)
        facts = made.facts.model_dump(mode="json")
        typer.echo(json.dumps({"out": str(made.folder), "registered": registered, **facts}, indent=2))
        return
    for sentence in made.facts.sentences:
        print_line(sentence)
    print_line(f"wrote {made.folder / 'fit.html'}")
    if made.registered is None:
        print_line("no router is registered: every tier would run at full depth.")
    else:
        print_line(f"registered: {model or engine.name} in {engine.dtype} uses these tiers from now on.")
