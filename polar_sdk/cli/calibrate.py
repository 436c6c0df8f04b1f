"""`polar lab calibrate`: certify what a router promises, on prompts it was not trained on."""

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
    from polar_sdk.lab.evaluation.calibrate import Resplits
    from polar_sdk.router.certificate import TierPromise
    from polar_sdk.router.learned import LearnedRouter


@opt.with_lab_model
def calibrate(
    router: Annotated[Path | None, typer.Option(help="Folder of the router; default: your own for this model.")] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="JSONL of prompts; repeatable; default: built-in. Prompts it was trained on are left out."),
    ] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(
            help="Promise of a tier: tier=α for answers that differ, tier=α:drops for the drop in accuracy, :harms for "
            "right answers turned wrong; :strict=α adds a promise on texts that lose more than 5 % of their tokens, "
            "e.g. economy=0.1:strict=0.3. May be repeated."
        ),
    ] = None,
    delta: Annotated[
        float, typer.Option(min=0.001, max=0.5, help="Maximum probability that a promise is wrong.")
    ] = 0.1,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default: the router's own.")] = None,
    resplits: Annotated[
        int, typer.Option(min=0, help="Also certify on N random halves, and count the broken promises.")
    ] = 0,
    as_json: opt.AsJson = False,
    *,
    load: opt.Load,
) -> None:
    """Certify the tiers of a router."""
    from polar_sdk.lab.evaluation.judge import Judge
    from polar_sdk.router.store import saved_router_path

    tiers = dict(promise_of("--tier", text) for text in tier) if tier else None
    items = [item for path in data for item in lab.read_items(path)] if data else None
    engine = load()
    folder = router or saved_router_path(engine.fingerprint, engine.dtype)
    with interruptible(), ProgressBars(quiet=as_json) as show:
        certified = lab.calibrate(engine, items, router=folder, tiers=tiers, delta=delta, out=out, on_progress=show)
        broken = []
        if resplits and certified.certificate is not None:
            promised = {name: promise.asked for name, promise in certified.certificate.tiers.items()}
            judge = Judge(engine, certified, on_progress=show)
            given = lab.builtin_items() if items is None else items
            broken = judge.resplit(given, tiers=promised, delta=delta, times=resplits)
    show_certified(certified, out or folder, broken, as_json=as_json)


def promise_of(option: str, text: str) -> tuple[str, TierPromise]:
    """A promise such as `economy=0.1`, `standard=0.05:drops` or `premium=0.02:differs:strict=0.2`."""
    from polar_sdk.programs.floors import TIERS
    from polar_sdk.router.certificate import LOSSES, TierPromise

    name, _, promise = text.partition("=")
    number, *words = promise.split(":")
    strict = [word.removeprefix("strict=") for word in words if word.startswith("strict=")]
    losses = [word for word in words if not word.startswith("strict=")] or ["differs"]
    loss = next((known for known in LOSSES if known == losses[0]), None)
    shares = [_share(number), *map(_share, strict)]
    if name not in TIERS[:-1] or None in shares or loss is None or len(losses) > 1 or len(strict) > 1:
        raise InvalidRequestError(
            f"{option} {text!r} is not a promise; write e.g. economy=0.1, standard=0.05:drops or "
            f"premium=0.02:differs:strict=0.2. Tiers: {', '.join(TIERS[:-1])}."
        )
    alpha, *others = (share for share in shares if share is not None)
    return name, TierPromise(alpha, loss, others[0] if others else None)


def _share(text: str) -> float | None:
    """A share above 0 and below 1; None if it is not one."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < 1 else None


def show_certified(router: LearnedRouter, folder: Path, broken: list[Resplits], *, as_json: bool) -> None:
    """Print what a router promises now, and where it is."""
    from polar_sdk.router.certificate import FORMS

    certificate = router.certificate
    assert certificate is not None
    if as_json:
        facts: dict[str, Any] = {"out": str(folder), "certificate": certificate.model_dump(mode="json")}
        if broken:
            facts["resplits"] = [count._asdict() for count in broken]
        typer.echo(json.dumps(facts, indent=2))
        return
    for name, promise in certificate.tiers.items():
        dial = ", ".join(f"θ = {promise.setting.of(form):.4g} for {FORMS[form]}" for form in certificate.saved)
        print_line(f"{name}: {promise.text} ({dial})")
    for count in broken:
        print_line(count.text)
    print_line(f"wrote {folder}")
