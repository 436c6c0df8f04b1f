"""`polar heal`: fit bridges over segments of layers, and say what they cost and how near they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polar_sdk.cli import options as opt
from polar_sdk.show.progress import ProgressBars

if TYPE_CHECKING:
    from polar_sdk.router.bridge_set import BridgeSet


def register(app: typer.Typer) -> None:
    """Add `polar heal`."""
    app.command(epilog='Example: polar heal --segments "12-15,17-20" --out bridges --distil 200')(heal)


def heal(
    segments: Annotated[
        str, typer.Option(help="First and last layers, such as 12-15,17-20; part groups not used together by ;")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the bridges to.")],
    data: Annotated[
        Path | None,
        typer.Option(help="JSONL of {prompt}, {prompt, answer} or {question, choices, answer}; default: built-in."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many items.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Most rank of the maps; default: full.")] = None,
    ridge: Annotated[float, typer.Option(help="Penalty, as a multiple of the mean variance of a state.")] = 1e-3,
    distil: Annotated[int, typer.Option(min=0, help="Steps of training on top of the closed form.")] = 0,
    rate: Annotated[float, typer.Option(help="Learning rate of the training.")] = 2e-4,
    choices: Annotated[float, typer.Option(min=0, help="Weight of full depth's choice scores in the training.")] = 1.0,
    labels: Annotated[
        float, typer.Option(min=0, help="Weight of the right choices in the training: fine-tunes the maps to labels.")
    ] = 0.0,
    drop: Annotated[float, typer.Option(min=0, help="How often the training leaves a bridge out.")] = 0.25,
    start: Annotated[Path | None, typer.Option(help="Folder of bridges to start from.")] = None,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Length of full depth's answers to prompts.")] = 24,
    seed: opt.Seed = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    as_json: opt.AsJson = False,
    model: opt.Model = None,
    device: opt.Device = "auto",
    precision: opt.Precision = "auto",
) -> None:
    """Fit cheap maps that stand for segments of layers; the model's own weights stay as they are."""
    from polar_sdk.lab.bridges.heal import Healer, HealOptions, parse_segments
    from polar_sdk.lab.items import read_items
    from polar_sdk.lab.rewards.cache import RewardCache, cache_path

    options = HealOptions(
        ridge=ridge,
        rank=rank,
        distil=distil,
        rate=rate,
        choices=choices,
        labels=labels,
        drop=drop,
        seed=seed or 0,
        answer_tokens=answer_tokens,
        start=None if start is None else str(start),
        resume=resume,
    )
    items = None if data is None else read_items(data, limit)
    engine = opt.load_model(model, device=device, precision=precision, no_ledger=True)
    parse_segments(segments, engine.depth)  # before anything takes time
    cache = RewardCache(cache_path(engine.fingerprint, engine.dtype))
    try:
        with cache, ProgressBars(quiet=as_json) as show:
            made = Healer(engine, items, segments, options, out=out, cache=cache, on_progress=show).run()
    except KeyboardInterrupt:
        typer.echo("note: the same command with --resume goes on from the last checkpoint.", err=True)
        raise
    if as_json:
        typer.echo(json.dumps(_facts(made, out), indent=2))
    else:
        _show(made, out)


def _facts(made: BridgeSet, out: Path) -> dict[str, object]:
    return {
        "out": str(out),
        "bytes": made.bytes,
        "model": made.model,
        "fingerprint": made.fingerprint,
        "data": made.data,
        "segments": [record.model_dump() for record in made.records],
        "training": made.training,
    }


def _show(made: BridgeSet, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("segment", "kind", "FLOPs per token", "error / error of a plain skip, held out")
    for record in made.records:
        error = "–" if record.error_of_skip is None else f"{record.error_of_skip:.3f}"
        table.add_row(f"{record.first}-{record.last}", record.kind, f"{record.flops_per_token:,}", error)
    console = Console()
    console.print(table)
    if "loss_trained" in made.training:
        kept = "kept" if made.training["kept_training"] else "not kept, the closed form is better"
        console.print(
            f"held-out loss: closed form {made.training['loss_closed_form']:.4f}, "
            f"trained {made.training['loss_trained']:.4f} ({kept})"
        )
    console.print(f"wrote {out} ({made.bytes / 1e6:.2f} MB)", soft_wrap=True)
