"""`polar lab heal`: fit bridges over segments of layers, or fills, and show their cost and their error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polar_sdk import lab
from polar_sdk.cli import options as opt
from polar_sdk.errors import InvalidRequestError
from polar_sdk.show.lines import print_line
from polar_sdk.show.progress import ProgressBars, interruptible

if TYPE_CHECKING:
    from polar_sdk.router.map_set import MapKind, MapSet

_ERRORS: dict[MapKind, str] = {"bridge": "error / error of a plain skip", "fill": "variance missed"}


@opt.with_lab_model
def heal(
    out: Annotated[Path, typer.Option(help="Folder to write the bridges or fills to.")],
    segments: Annotated[
        str,
        typer.Option(
            help="Bridges: first and last layers, e.g. 12-15,17-20; a semicolon separates alternative groups."
        ),
    ] = "",
    fills: Annotated[
        str,
        typer.Option(
            help="Fills instead of bridges: first layers of fills that reach to the last layer, e.g. 27,24,20; "
            "18-21+23 fills layers 18 to 21 and those from 23 on in one program; 'default' finds them by measuring."
        ),
    ] = "",
    data: opt.Data = None,
    limit: opt.Limit = None,
    distil: Annotated[int, typer.Option(min=0, help="Training steps after the fit in closed form.")] = 0,
    start: Annotated[
        Path | None, typer.Option(help="Folder of bridges or fills to start from; they are not fitted again.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Another option of the fit, e.g. rank=64; may be repeated. Both: rank, ridge, rate, answer_tokens; "
            "bridges: choices, labels, drop; fills: units, prompts, tail, hidden, storage.",
        ),
    ] = None,
    seed: opt.Seed = None,
    as_json: opt.AsJson = False,
    *,
    load: opt.Load,
) -> None:
    """Fit cheap maps that replace layers: bridges cross a segment, fills write its keys and values for the prompt.

    The model's own weights are not changed. After Ctrl-C, the same command resumes where it stopped.
    """
    from polar_sdk.lab.rewards.cache import RewardCache, cache_path

    if bool(segments) == bool(fills):
        raise InvalidRequestError(
            "give --segments for bridges, e.g. 12-15,17-20, or --fills, e.g. 27,24,20, but not both."
        )
    kind: MapKind = "bridge" if segments else "fill"
    options: dict[str, Any] = {
        "distil": distil,
        "seed": seed or 0,
        "start": None if start is None else str(start),
        **dict(opt.name_and_value("--set", text, "rank=64") for text in settings or ()),
    }
    # Checks them before seconds are spent on loading the model.
    lab.BridgeOptions.of(**options) if segments else lab.FillOptions.of(**options)
    items = opt.items_of(data, limit)
    engine = load()
    cache = RewardCache(cache_path(engine.fingerprint, engine.dtype))
    with interruptible(), cache, ProgressBars(quiet=as_json) as show:
        made = lab.heal(engine, items, segments or fills, kind=kind, out=out, cache=cache, on_progress=show, **options)
    if as_json:
        typer.echo(json.dumps({"out": str(out), "bytes": made.bytes, **made.facts.model_dump(mode="json")}, indent=2))
    else:
        _show(made, out)


def _show(maps: MapSet, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layers", "form", "FLOPs per token", f"{_ERRORS[maps.facts.kind]}, held out")
    for record in maps.facts.segments:
        error = "–" if record.error is None else f"{record.error:.3f}"
        table.add_row(f"{record.first}-{record.last}", record.form, f"{record.flops_per_token:,}", error)
    console = Console(markup=False)
    console.print(table)
    console.print(f"made for: {'; '.join(program.text for program in maps.programs)}", soft_wrap=True)
    for row in maps.facts.training.get("held_out", ()):
        losses = f"{row['closed_form']:.4f} before training, {row['trained']:.4f} after it"
        kept = "kept" if row["kept"] else "not kept"
        console.print(f"{row['program']}: held-out loss {losses} ({kept})", soft_wrap=True)
    print_line(f"wrote {out} ({maps.bytes / 1e6:.2f} MB)")
