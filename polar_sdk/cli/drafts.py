"""`polar lab drafts`: a draft head trained on a model's own answers, by which its next answers come sooner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from polar_sdk import lab
from polar_sdk.cli import options as opt
from polar_sdk.errors import InvalidRequestError
from polar_sdk.show.lines import print_line
from polar_sdk.show.progress import ProgressBars, interruptible


@opt.with_lab_model
def drafts(
    data: Annotated[
        Path | None,
        typer.Option(help="JSONL of {prompt} or {prompt, answer}; default: the model asks itself."),
    ] = None,
    limit: opt.Limit = None,
    questions: Annotated[
        int | None,
        typer.Option(min=0, help="Questions that the model asks itself; default: 2000, or none with --data."),
    ] = None,
    answer_tokens: Annotated[int, typer.Option(min=4, help="Maximum tokens of an answer.")] = 96,
    epochs: Annotated[int, typer.Option(min=1, help="How often each answer is seen in training.")] = 6,
    out: Annotated[Path | None, typer.Option(help="File of the head; default: your own for this model.")] = None,
    seed: opt.Seed = None,
    as_json: opt.AsJson = False,
    *,
    load: opt.Load,
) -> None:
    """Train a draft head: a network that guesses what a model says next, so that answers come sooner and stay the same.

    It serves all tenants, so give it no prompt of one that others may not learn from. After Ctrl-C the same command
    goes on where it stopped.
    """
    from polar_sdk.lab.rewards.cache import RewardCache, cache_path
    from polar_sdk.models.draft_heads import saved_head_path

    if limit is not None and data is None:
        raise InvalidRequestError(
            f"--limit {limit} is for the prompts of --data, and none are given; use --questions {limit} to have the "
            "model ask itself so often."
        )
    items = opt.items_of(data, limit)  # before seconds are spent on loading the model
    engine = load()
    target = out or saved_head_path(engine.fingerprint)
    cache = RewardCache(cache_path(engine.fingerprint, engine.dtype))
    with interruptible(), cache, ProgressBars(quiet=as_json) as show:
        head = lab.train_draft_head(
            engine,
            items,
            out=target,
            cache=cache,
            checkpoints=target.parent / f"{target.stem}-checkpoints",
            on_progress=show,
            questions=questions,
            answer_tokens=answer_tokens,
            epochs=epochs,
            seed=seed or 0,
        )
    facts = head.facts
    if as_json:
        known = {"out": str(target), "parameters": head.parameters, "bytes": target.stat().st_size}
        typer.echo(json.dumps({**known, **facts.model_dump()}, indent=2))
        return
    right = (
        ""
        if facts.right is None
        else f"; of held-out answers it guesses {facts.right:.0%} of the tokens, and {facts.guessed:.2f} in a row"
    )
    print_line(f"{head.parameters:,} numbers from {facts.tokens:,} tokens of {facts.answers:,} answers{right}")
    print_line(f"wrote {target} ({target.stat().st_size / 1e6:.2f} MB)")
