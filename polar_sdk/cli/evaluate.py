"""`polar evaluate`: a router beside identity and honest controls, as a table, as JSON and as an HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polar_sdk import lab
from polar_sdk.cli import options as opt
from polar_sdk.errors import InvalidRequestError
from polar_sdk.show.progress import ProgressBars

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

    from polar_sdk.lab.evaluation.results import Evaluation
    from polar_sdk.router.base import Router


_WIDTH = 150
"""Width that a table of figures needs; a narrower terminal wraps its lines, so that nothing is lost."""


@opt.with_lab_model
def evaluate(
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSONL of {prompt}, {prompt, answer} or {question, choices, answer}; repeatable; default: built-in."
        ),
    ] = None,
    router: Annotated[Path | None, typer.Option(help="Folder of the router; default: the model's.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N items of each file.")] = None,
    compute: Annotated[
        list[str] | None,
        typer.Option("--compute", "-c", help="Tier or tolerance; repeatable; the first is compared with the controls."),
    ] = None,
    theta: Annotated[
        list[float] | None, typer.Option(help="Setting of the dial (θ), without a promise; repeatable.")
    ] = None,
    timed: Annotated[int, typer.Option(min=0, help="Prompts to time at batch 1.")] = 8,
    free: Annotated[
        int, typer.Option(min=0, help="Prompts that every tier also answers freely, to compare the texts.")
    ] = 0,
    seed: opt.Seed = None,
    html: Annotated[Path | None, typer.Option(help="Write an HTML page, with the frontier plotted.")] = None,
    as_json: opt.AsJson = False,
    *,
    load: opt.Load,
) -> None:
    """Measure a router on prompts that it has not seen."""
    from polar_sdk.lab.evaluation.rendering import require_report, to_html

    if html is not None:  # before minutes are spent on measuring
        require_report()
        if not html.absolute().parent.is_dir():
            raise InvalidRequestError(
                f"--html {str(html)!r} cannot be written: its folder does not exist; create it first."
            )
    sets = {path.stem: lab.read_items(path, limit) for path in data} if data else opt.items_of(None, limit)
    engine = load(router=router)
    points = _points(engine.router, compute or [], theta or [])
    with ProgressBars(quiet=as_json) as show:
        evaluation = lab.evaluate(engine, sets, points=points, timed=timed, free=free, seed=seed or 0, on_progress=show)
    if html is not None:
        html.write_text(to_html(evaluation), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(evaluation.plain(), indent=2))
    else:
        _show(evaluation)


def _points(router: Router | None, compute: list[str], thetas: list[float]) -> dict[str, float] | None:
    """θ by name, for the given tiers, tolerances and settings; None = the default points."""
    from polar_sdk.router.learned import AtTheta, LearnedRouter

    if not (compute or thetas) or not isinstance(router, LearnedRouter):
        return None
    points = {}
    for text in compute:
        served = router.serving(opt.compute_of(text))[1]
        points[text] = served.theta if isinstance(served, AtTheta) else 0.0
    return points | {f"θ = {theta:g}": theta for theta in thetas}


def _show(evaluation: Evaluation) -> None:
    from rich.console import Console

    from polar_sdk.lab.evaluation import rendering

    console = Console()
    console.width = max(console.width, _WIDTH)
    where = f"{evaluation.dtype} on {evaluation.device}"
    console.print(f"{evaluation.model} ({where}): {evaluation.router}, compared at {evaluation.point}")
    for result in evaluation.sets:
        title = f"{result.name}: {result.prompts} prompts, {result.labelled} with a right answer"
        _show_table(console, title, rendering.COLUMNS, rendering.rows(result))
        for system in result.systems:
            if system.note:
                console.print(f"{system.name}: {system.note}", soft_wrap=True)
    _show_table(console, "within each class", rendering.CLASS_COLUMNS, rendering.class_rows(evaluation.classes))
    if evaluation.texts:
        _show_table(console, "answers in text", rendering.TEXT_COLUMNS, rendering.text_rows(evaluation.texts))
    for name, promise in evaluation.certificate.tiers.items() if evaluation.certificate else ():
        console.print(f"{name}: {promise.text}", soft_wrap=True)
    if evaluation.certificate and not evaluation.certificate_holds:
        console.print("The certificate does not hold for what was run here.")
    for sentence in evaluation.verdict:
        console.print(f"• {sentence}", soft_wrap=True)


def _show_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
