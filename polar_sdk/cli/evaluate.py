"""`polar evaluate`: a router against identity and controls, or tiers on a suite; as a table, JSON and an HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, cast

import typer

from polar_sdk import lab
from polar_sdk.cli import options as opt
from polar_sdk.errors import InvalidRequestError
from polar_sdk.show.progress import ProgressBars, interruptible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rich.console import Console

    from polar_sdk.lab.evaluation.results import Evaluation
    from polar_sdk.model import PolarModel
    from polar_sdk.request.options import Template
    from polar_sdk.router.base import Router
    from polar_sdk.router.certificate import Setting


_WIDTH = 170
"""Width that a table of figures needs; a narrower terminal wraps its lines, so that nothing is lost."""


@opt.with_lab_model
def evaluate(
    suite: Annotated[
        str | None,
        typer.Option(
            help="Known problems: mmlu, arc, gsm8k, humaneval, with --data; built-in: formats, refusals, decisions."
        ),
    ] = None,
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
    program: Annotated[
        list[str] | None,
        typer.Option("--program", "-p", help="With --suite: program by hand for all problems; repeatable."),
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="With --suite: number of solved problems before each one.")] = 0,
    shots_from: Annotated[Path | None, typer.Option(help="With --suite: file of solved problems.")] = None,
    template: Annotated[
        str, typer.Option(help="With --suite: whether to use the model's chat template: auto, chat or raw.")
    ] = "auto",
    run_code: Annotated[
        bool, typer.Option("--run-code", help="With --suite: run code that the model writes, in a confined process.")
    ] = False,
    timed: Annotated[int, typer.Option(min=0, help="Number of prompts to time at batch 1.")] = 8,
    free: Annotated[
        int, typer.Option(min=0, help="Number of prompts that every tier also answers freely, to compare the texts.")
    ] = 0,
    seed: opt.Seed = None,
    html: Annotated[Path | None, typer.Option(help="Write an HTML page with a plot of the frontier.")] = None,
    as_json: opt.AsJson = False,
    *,
    load: opt.Load,
) -> None:
    """Measure a router on prompts that it has not seen or, with --suite, every tier on known problems."""
    from polar_sdk.lab.evaluation.rendering import require_report, to_html

    if html is not None:  # before minutes are spent on measuring
        require_report()
        if not html.absolute().parent.is_dir():
            raise InvalidRequestError(
                f"--html {str(html)!r} cannot be written: its folder does not exist; create it first."
            )
    if suite is not None:
        asked = _Asked(suite, data or [], limit, shots, shots_from, cast("Template", template), run_code)
        _evaluate_suite(asked, lambda: load(router=router), compute or [], theta or [], program or [], html, as_json)
        return
    if program or shots or shots_from or run_code:
        raise InvalidRequestError("--program, --shots, --shots-from and --run-code need a suite; name it with --suite.")
    sets = {path.stem: lab.read_items(path, limit) for path in data} if data else opt.items_of(None, limit)
    engine = load(router=router)
    points = _points(engine.router, compute or [], theta or [])
    with interruptible(), ProgressBars(quiet=as_json) as show:
        evaluation = lab.evaluate(engine, sets, points=points, timed=timed, free=free, seed=seed or 0, on_progress=show)
    if html is not None:
        html.write_text(to_html(evaluation), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(evaluation.plain(), indent=2))
    else:
        _show(evaluation)


class _Asked(NamedTuple):
    """The values of `--suite` and the options beside it."""

    suite: str
    data: list[Path]
    limit: int | None
    shots: int
    shots_from: Path | None
    template: Template
    run_code: bool

    def check(self) -> None:
        """Check what can be checked without a model, before one is loaded."""
        from polar_sdk.lab.suites.evaluate import find_suite
        from polar_sdk.lab.suites.suite import check_shots

        suite = find_suite(self.suite, run_code=self.run_code)
        if len(self.data) > 1:
            raise InvalidRequestError(f"a suite takes one file (got {len(self.data)}); name it with --data.")
        check_shots(suite, self.shots, self.shots_from)
        suite.problems(self.file, self.limit)

    @property
    def file(self) -> Path | None:
        """The file that was named; None = none was."""
        return next(iter(self.data), None)


def _evaluate_suite(
    asked: _Asked,
    load: Callable[[], PolarModel],
    compute: list[str],
    thetas: list[float],
    programs: list[str],
    html: Path | None,
    as_json: bool,
) -> None:
    from polar_sdk.lab.suites import rendering

    asked.check()
    model = load()
    with interruptible(), ProgressBars(quiet=as_json) as show:
        found = lab.evaluate_suite(
            model,
            asked.suite,
            asked.file,
            compute=[value for text in compute if (value := opt.compute_of(text)) is not None],
            thetas=thetas,
            programs=programs,
            shots=asked.shots,
            shots_from=asked.shots_from,
            template=asked.template,
            limit=asked.limit,
            run_code=asked.run_code,
            on_progress=show,
        )
    if html is not None:
        html.write_text(rendering.to_html(found), encoding="utf-8")
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
        return
    console = _console()
    title = f"{found.suite}: {found.model} ({found.dtype} on {found.device})"
    _show_table(console, title, rendering.COLUMNS, rendering.rows(found))
    for sentence in rendering.notes(found):
        console.print(f"• {sentence}", soft_wrap=True)


def _points(router: Router | None, compute: list[str], thetas: list[float]) -> dict[str, Setting] | None:
    """Settings of the dial by name, for the given tiers, tolerances and settings; None = the default points."""
    from polar_sdk.router.certificate import Setting
    from polar_sdk.router.learned import AtSetting, LearnedRouter

    if not (compute or thetas) or not isinstance(router, LearnedRouter):
        return None
    points = {}
    for text in compute:
        served = router.serving(opt.compute_of(text)).router
        points[text] = served.setting if isinstance(served, AtSetting) else Setting()
    return points | {f"θ = {theta:g}": Setting.to(theta) for theta in thetas}


def _show(evaluation: Evaluation) -> None:
    from polar_sdk.lab.evaluation import rendering

    console = _console()
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


def _console() -> Console:
    from rich.console import Console

    console = Console(markup=False)
    console.width = max(console.width, _WIDTH)
    return console


def _show_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
