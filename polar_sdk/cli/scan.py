"""`polar lab scan`: which layers this model can do without, as a heat map; saved as a policy on request."""

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
    from rich.table import Table

    from polar_sdk.lab.layer_scan import ProgramScore, ScanReport


_BUILTIN = 70
"""Built-in prompts that a scan uses by default; all of them would take ten times as long."""
_COLOURS = ((0.9, "green"), (0.75, "yellow"), (0.5, "magenta"), (0, "red"))
"""Minimum fidelity of each colour."""


@opt.with_lab_model
def scan(
    data: Annotated[
        Path | None,
        typer.Option(help="JSONL of {prompt} or {question, choices, answer}; default: 70 built-in prompts."),
    ] = None,
    limit: opt.Limit = None,
    lengths: Annotated[str, typer.Option(help="Lengths of the skipped blocks, comma-separated.")] = "1,2,3",
    loops: Annotated[bool, typer.Option(help="Also measure each layer visited twice.")] = True,
    removals: Annotated[int, typer.Option(min=0, help="Layers to remove, one after another.")] = 8,
    standard: Annotated[float, typer.Option(min=0, max=1, help="Minimum fidelity of the standard tier.")] = 0.8,
    economy: Annotated[float, typer.Option(min=0, max=1, help="Minimum fidelity of the economy tier.")] = 0.7,
    save: Annotated[bool, typer.Option("--save", help="Save the picks as your policy for this model.")] = False,
    out: Annotated[Path | None, typer.Option(help="File to write the whole scan to, as JSON.")] = None,
    as_json: opt.AsJson = False,
    *,
    load: opt.Load,
) -> None:
    """Compare blocks of skipped layers and loops with full depth, and pick programs for two tiers."""
    sizes = opt.numbers("--lengths", lengths, int, "1,2,3")
    if min(sizes) < 1:
        raise InvalidRequestError(f"--lengths {lengths!r} is out of range; use numbers from 1.")
    if out is not None and not out.absolute().parent.is_dir():  # before minutes are spent on scanning
        raise InvalidRequestError(f"--out {str(out)!r} cannot be written: its folder does not exist; create it first.")
    items = opt.items_of(data, limit or (_BUILTIN if data is None else None))
    engine = load()
    with ProgressBars(quiet=as_json) as show:
        report = lab.scan(engine, items, lengths=sizes, loops=loops, removals=removals, on_progress=show)
    if out is not None:
        out.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    picks = {"economy": report.cheapest(economy), "standard": report.cheapest(standard)}
    saved = _save(report, picks) if save else None
    if as_json:
        facts = {"picks": {name: pick.model_dump(mode="json") for name, pick in picks.items()}, "saved": saved}
        typer.echo(json.dumps({**report.model_dump(mode="json"), **facts}, indent=2))
    else:
        _show(report, picks, saved)


def _save(report: ScanReport, picks: dict[str, ProgramScore]) -> str:
    from polar_sdk.lab.layer_scan import policy_of
    from polar_sdk.router.store import saved_policy_path

    path = saved_policy_path(report.fingerprint)
    policy_of(report, picks).save(path)
    return str(path)


def _show(report: ScanReport, picks: dict[str, ProgramScore], saved: str | None) -> None:
    from rich.console import Console

    console = Console()
    console.print(
        f"{report.model} ({report.dtype}): {report.prompts} prompts with {report.answer_tokens} answer tokens, "
        f"{report.questions} questions; fidelity = share that is the same as at full depth"
    )
    console.print(_heat_map(report))
    console.print(_list("Greedy removal", [report.identity, *report.path]))
    console.print(_list("Picks", [report.identity, *picks.values()], ["exact", *picks]))
    if saved:
        console.print(f"saved as {saved}", soft_wrap=True)


def _heat_map(report: ScanReport) -> Table:
    from rich.table import Table

    table = Table(
        title="Fidelity in %, by first layer and length of the skipped block (x2: visited twice)", padding=(0, 0)
    )
    depth = len(report.identity.program)
    table.add_column("len ", justify="right")
    for layer in range(depth):
        table.add_column(f"{layer:3d}", justify="right", no_wrap=True)
    rows: dict[str, dict[int, float]] = {}
    for score in report.skips:
        skipped = score.program.skips(depth)
        rows.setdefault(str(len(skipped)), {})[skipped[0]] = score.fidelity
    for score in report.loops:
        rows.setdefault("x2", {})[score.program.visits(depth).index(2)] = score.fidelity
    for name, cells in rows.items():
        table.add_row(name, *[_cell(cells.get(layer)) for layer in range(depth)])
    return table


def _cell(share: float | None) -> str:
    if share is None:
        return "  ·"
    colour = next(name for floor, name in _COLOURS if share >= floor)
    return f"[{colour}]{share * 100:3.0f}[/]"


def _list(title: str, scores: list[ProgramScore], names: list[str] | None = None) -> Table:
    from rich.table import Table

    table = Table("", "program", "FLOPs", "agreement", "nats lost", "same choice", "accuracy", title=title)
    for index, score in enumerate(scores):
        table.add_row(
            names[index] if names else str(index),
            score.program.text,
            f"{score.flops_ratio:.1%}",
            *(
                "–" if value is None else form.format(value)
                for value, form in (
                    (score.agreement, "{:.1%}"),
                    (score.excess_nats, "{:.3f}"),
                    (score.same_choice, "{:.1%}"),
                    (score.accuracy, "{:.1%}"),
                )
            ),
        )
    return table
