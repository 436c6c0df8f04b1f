"""`polar lab train`: a router from the rewards of a search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polar_sdk import lab
from polar_sdk.cli import options as opt
from polar_sdk.show.lines import print_line
from polar_sdk.show.progress import ProgressBars, interruptible

if TYPE_CHECKING:
    from polar_sdk.router.learned import LearnedRouter


@opt.with_lab_model
def train(
    rewards: Annotated[Path, typer.Option(help="Rewards file that `polar lab search` wrote.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the router; default: your own for this model.")] = None,
    kind: Annotated[
        Literal["menu", "table", "policy", "static"],
        typer.Option(
            help="Choose a program by the prompt (menu) or by its kind (table), or an action for each layer (policy); "
            "or one program for all (static)."
        ),
    ] = "menu",
    features: Annotated[
        Literal["embedding", "ending", "edges"],
        typer.Option(
            help="Read the mean of all embeddings (embedding), also that of the last ones (ending), or also that of "
            "the last message's first ones (edges)."
        ),
    ] = "edges",
    loss: Annotated[
        Literal["differs", "harms", "drops", "strict"],
        typer.Option(
            help="What counts as lost: another answer (differs); right turned wrong (harms); the same minus wrong "
            "turned right (drops); or 5 % of the tokens (strict)."
        ),
    ] = "differs",
    maps: opt.Maps = None,
    data: Annotated[
        Path | None, typer.Option(help="For --kind policy: the JSONL that was searched; default: built-in.")
    ] = None,
    price: Annotated[float, typer.Option(min=0.01, help="For --kind policy: price of a lost prompt.")] = 3.0,
    epochs: Annotated[int, typer.Option(min=1, help="For --kind policy: passes over the prompts.")] = 8,
    seeds: Annotated[str, typer.Option(help="Training seeds, comma-separated; the best on dev is kept.")] = "0,1,2",
    as_json: opt.AsJson = False,
    *,
    load: opt.Load,
) -> None:
    """Train a router; after Ctrl-C, the same command resumes from its checkpoints."""
    from polar_sdk.router.store import saved_router_path

    tried = opt.numbers("--seeds", seeds, int, "0,1,2")
    settings: lab.MenuSettings | lab.LayerwiseSettings = lab.MenuSettings(loss=loss, seeds=tried)
    if kind == "policy":
        settings = lab.LayerwiseSettings(price=price, epochs=epochs, seeds=tried)
    matrix = lab.RewardMatrix.load(rewards)  # before seconds are spent on loading the model
    items = None if data is None else lab.read_items(data)
    engine = load()
    target = out or saved_router_path(engine.fingerprint, engine.dtype)
    with interruptible(), ProgressBars(quiet=as_json) as show:
        router = lab.train(
            engine,
            matrix,
            kind=kind,
            items=items,
            features=features,
            settings=settings,
            out=target,
            maps=maps or (),
            on_progress=show,
        )
    _report(router, target, as_json=as_json)


def _report(router: LearnedRouter, target: Path, *, as_json: bool) -> None:
    training: dict[str, Any] = {name: value for name, value in router.facts.training.items() if name != "seen"}
    if as_json:
        facts = {"out": str(target), "kind": router.kind, "version": router.version, "training": training}
        typer.echo(json.dumps(facts, indent=2))
        return
    size = f"{training['parameters']:,} parameters ({training['parameter_share']:.2g} of the base model's)"
    print_line(f"{router.kind} router {router.version}, {size}")
    mean = f"{training['utility_mean']:.4f} ± {training['utility_spread']:.4f}"
    print_line(f"utility on dev {training['utility']:.4f}; mean over the seeds {mean}")
    print_line(f"wrote {target}; it has no certificate until you run `polar lab calibrate --router {target}`")
