"""`polar drafts`: a draft table from a model's own answers, by which its next answers come sooner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from polar_sdk import lab
from polar_sdk.cli import options as opt
from polar_sdk.show.lines import print_line
from polar_sdk.show.progress import ProgressBars


def register(app: typer.Typer) -> None:
    """Add `polar drafts`."""
    app.command(epilog="Example: polar drafts --data prompts.jsonl")(drafts)


def drafts(
    data: Annotated[
        Path | None,
        typer.Option(help="JSONL of {prompt} or {prompt, answer}; default: the model asks itself."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N items.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="Without --data: questions that the model asks itself.")] = 2000,
    answer_tokens: Annotated[int, typer.Option(min=2, help="Maximum tokens of an answer.")] = 96,
    out: Annotated[Path | None, typer.Option(help="File of the table; default: your own for this model.")] = None,
    seed: opt.Seed = None,
    as_json: opt.AsJson = False,
    model: opt.Model = None,
    device: opt.Device = "auto",
    device_map: opt.DeviceMap = None,
    precision: opt.Precision = "auto",
) -> None:
    """Make a draft table: what a model usually says after what, so that its answers come sooner and stay the same.

    It serves all tenants, so give it no prompt of one that others may not learn from. After Ctrl-C the same command
    goes on where it stopped.
    """
    from polar_sdk.lab.rewards.cache import RewardCache, cache_path
    from polar_sdk.models.load import saved_table_path

    items = None if data is None else lab.read_items(data, limit)  # before seconds are spent on loading the model
    engine = opt.load_model(model, device=device, device_map=device_map, precision=precision, no_ledger=True)
    target = out or saved_table_path(engine.fingerprint)
    cache = RewardCache(cache_path(engine.fingerprint, engine.dtype))
    try:
        with cache, ProgressBars(quiet=as_json) as show:
            table = lab.make_draft_table(
                engine,
                items,
                out=target,
                cache=cache,
                on_progress=show,
                questions=questions,
                answer_tokens=answer_tokens,
                seed=seed or 0,
            )
    except KeyboardInterrupt:
        print_line("note: the same command goes on where it stopped.", err=True)
        raise
    if as_json:
        facts = {"out": str(target), "entries": len(table), "bytes": table.bytes, **table.facts.model_dump()}
        typer.echo(json.dumps(facts, indent=2))
        return
    right = (
        "" if table.facts.right is None else f"; of held-out answers it guesses {table.facts.right:.0%} of the tokens"
    )
    print_line(f"{len(table):,} entries from {table.facts.tokens:,} tokens of {table.facts.answers:,} answers{right}")
    print_line(f"wrote {target} ({target.stat().st_size / 1e6:.2f} MB)")
