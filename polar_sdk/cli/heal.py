"""`polar lab heal`: fit bridges over segments of layers, or fills, and show their cost and their error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polar_sdk import lab
from polar_sdk.cli import options as opt
from polar_sdk.errors import InvalidRequestError
from polar_sdk.programs.program import TAIL
from polar_sdk.show.lines import print_line
from polar_sdk.show.progress import ProgressBars

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polar_sdk.router.bridge_set import BridgeSet
    from polar_sdk.router.fill_set import FillSet


def register(app: typer.Typer) -> None:
    """Add `polar lab heal`."""
    app.command(epilog='Example: polar lab heal --segments "12-15,17-20" --out bridges --distil 200')(heal)


def heal(
    context: typer.Context,
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
            help="Fills instead of bridges: first layers of what is filled up to the last layer, e.g. 27,24,20; "
            "18-21+23 fills layers 18 to 21 and those from 23 on in one program; default finds them by measuring."
        ),
    ] = "",
    data: Annotated[
        Path | None,
        typer.Option(help="JSONL of {prompt}, {prompt, answer} or {question, choices, answer}; default: built-in."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N items.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Maximum rank of the maps; default: full.")] = None,
    units: Annotated[
        int, typer.Option(min=0, help="For --fills: hidden units of each map, beside the state; 0: an affine map.")
    ] = 0,
    ridge: Annotated[float, typer.Option(help="Ridge penalty, as a multiple of the mean variance of a state.")] = 1e-3,
    distil: Annotated[int, typer.Option(min=0, help="Training steps after the closed form.")] = 0,
    rate: Annotated[
        float | None, typer.Option(help="Learning rate of the training; default: 2e-4, for fills 3e-4.")
    ] = None,
    choices: Annotated[
        float, typer.Option(min=0, help="For --segments: weight of full depth's choice scores in the training.")
    ] = 1.0,
    labels: Annotated[
        float,
        typer.Option(
            min=0, help="For --segments: weight of the right choices in the training; above 0 it fine-tunes to labels."
        ),
    ] = 0.0,
    drop: Annotated[
        float, typer.Option(min=0, help="For --segments: probability that the training leaves a bridge out.")
    ] = 0.25,
    tail: Annotated[
        int, typer.Option(min=1, help="For --fills: last tokens of a prompt that run all layers in the training.")
    ] = TAIL,
    start: Annotated[
        Path | None, typer.Option(help="Folder of bridges or fills to start from: those in it are not fitted again.")
    ] = None,
    answer_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens of full depth's answers; default: 24, for fills 48.")
    ] = None,
    storage: Annotated[Literal["int8", "float16"], typer.Option(help="For --fills: how weights are stored.")] = "int8",
    seed: opt.Seed = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in --out.")] = False,
    as_json: opt.AsJson = False,
    model: opt.Model = None,
    device: opt.Device = "auto",
    precision: opt.Precision = "auto",
) -> None:
    """Fit cheap maps for layers: bridges cross a segment, fills write its keys and values for the prompt.

    The model's own weights are not changed.
    """
    from polar_sdk.lab.healing.run import CHECKPOINT
    from polar_sdk.lab.rewards.cache import RewardCache, cache_path
    from polar_sdk.router.fill_set import FillSet

    if bool(segments) == bool(fills):
        raise InvalidRequestError(
            "give --segments for bridges, e.g. 12-15,17-20, or --fills, e.g. 27,24,20: one of the two."
        )
    shared = {
        "ridge": ridge,
        "rank": rank,
        "distil": distil,
        "seed": seed or 0,
        "resume": resume,
        "start": None if start is None else str(start),
        **({} if rate is None else {"rate": rate}),
        **({} if answer_tokens is None else {"answer_tokens": answer_tokens}),
    }
    of_bridges = {"choices": choices, "labels": labels, "drop": drop}
    of_fills = {"storage": storage, "units": units, "tail": tail}
    _refuse_given(context, of_fills if segments else of_bridges, "--fills" if segments else "--segments")
    options: dict[str, Any] = {**shared, **(of_bridges if segments else of_fills)}
    # Checks them before seconds are spent on loading the model.
    lab.HealOptions(**options) if segments else lab.FillOptions(**options)
    items = opt.items_of(data, limit)
    engine = opt.load_model(model, device=device, precision=precision, no_ledger=True)
    cache = RewardCache(cache_path(engine.fingerprint, engine.dtype))
    made: BridgeSet | FillSet
    try:
        with cache, ProgressBars(quiet=as_json) as show:
            if segments:
                made = lab.heal(engine, items, segments, out=out, cache=cache, on_progress=show, **options)
            else:
                made = lab.heal_fills(engine, items, fills, out=out, cache=cache, on_progress=show, **options)
    except KeyboardInterrupt:
        if (out / CHECKPOINT).is_file():
            print_line("note: the same command with --resume continues from the last checkpoint.", err=True)
        else:
            print_line("note: answers of full depth are kept; the same command starts from there.", err=True)
        raise
    if as_json:
        typer.echo(json.dumps(_facts(made, out), indent=2))
    elif isinstance(made, FillSet):
        _show_fills(made, out)
    else:
        _show(made, out)


def _refuse_given(context: typer.Context, options: Iterable[str], only_with: str) -> None:
    """Refuse options of the other kind of maps, which would change nothing.

    Raises:
        InvalidRequestError: One of them was given.
    """
    for name in options:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InvalidRequestError(f"--{name} is for {only_with} and changes nothing here; leave it out.")


def _facts(maps: BridgeSet | FillSet, out: Path) -> dict[str, object]:
    return {
        "out": str(out),
        "bytes": maps.bytes,
        "model": maps.model,
        "fingerprint": maps.fingerprint,
        "data": maps.data,
        "segments": [record.model_dump() for record in maps.records],
        "training": maps.training,
    }


def _show(bridges: BridgeSet, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("segment", "kind", "FLOPs per token", "error / error of a plain skip, held out")
    for record in bridges.records:
        error = "–" if record.error_of_skip is None else f"{record.error_of_skip:.3f}"
        table.add_row(f"{record.first}-{record.last}", record.kind, f"{record.flops_per_token:,}", error)
    console = Console()
    console.print(table)
    if "loss_trained" in bridges.training:
        kept = "kept" if bridges.training["kept_training"] else "not kept"
        console.print(
            f"held-out loss {bridges.training['loss_closed_form']:.4f} before training, "
            f"{bridges.training['loss_trained']:.4f} after it ({kept})"
        )
    console.print(f"wrote {out} ({bridges.bytes / 1e6:.2f} MB)", soft_wrap=True)


def _show_fills(fills: FillSet, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("filled", "kind", "FLOPs per filled token", "variance missed, held out")
    for record in fills.records:
        missed = "–" if record.unexplained is None else f"{record.unexplained:.3f}"
        table.add_row(f"({record.first}-{record.last})", record.kind, f"{record.flops_per_token:,}", missed)
    console = Console()
    console.print(table)
    console.print(f"made for: {'; '.join(program.text for program in fills.programs)}", markup=False, soft_wrap=True)
    for row in fills.training.get("held_out", ()):
        kept = "kept" if row["trained"] < row["closed_form"] else "not kept"
        losses = f"{row['closed_form']:.4f} before training, {row['trained']:.4f} after it"
        console.print(f"{row['program']}: held-out loss {losses} ({kept})", markup=False, soft_wrap=True)
    console.print(f"wrote {out} ({fills.bytes / 1e6:.2f} MB)", soft_wrap=True)
