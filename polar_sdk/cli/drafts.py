"""`polar lab drafts`: a draft head trained on a model's own answers, so that its next answers take less time."""

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
        typer.Option(help="JSONL of {prompt} or {prompt, answer}; default: the model writes its own questions."),
    ] = None,
    limit: opt.Limit = None,
    questions: Annotated[
        int | None,
        typer.Option(min=0, help="Number of questions that the model writes; default: 2000, or none with --data."),
    ] = None,
    answer_tokens: Annotated[int, typer.Option(min=4, help="Maximum number of tokens in an answer.")] = 96,
    epochs: Annotated[int, typer.Option(min=1, help="Number of passes over the answers in training.")] = 6,
    out: Annotated[Path | None, typer.Option(help="File of the head; default: your own for this model.")] = None,
    seed: opt.Seed = None,
    as_json: opt.AsJson = False,
    *,
    load: opt.Load,
) -> None:
    """Train a draft head: a network that guesses the model's next tokens, so that the same answers take less time.

    It serves all tenants, so do not train it on confidential prompts. After Ctrl-C, the same command resumes where it
    stopped.
    """
    from polar_sdk.lab.rewards.cache import RewardCache, cache_path
    from polar_sdk.models.draft_heads import saved_head_path

    if limit is not None and data is None:
        raise InvalidRequestError(
            f"--limit {limit} limits the prompts of --data, which is not given; use --questions {limit} to limit the "
            "questions that the model writes."
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
