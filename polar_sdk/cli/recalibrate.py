"""`polar recalibrate`: new promises for a router, from audited prompts that were kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polar_sdk import lab
from polar_sdk.cli import options as opt
from polar_sdk.cli.calibrate import show_certified
from polar_sdk.errors import DataError, RouterError
from polar_sdk.show.lines import print_line
from polar_sdk.show.progress import ProgressBars, interruptible


@opt.with_lab_model
def recalibrate(
    router: Annotated[
        Path | None, typer.Option(help="Folder of the router; default: the one that serves this model.")
    ] = None,
    delta: Annotated[
        float | None, typer.Option(min=0.001, max=0.5, help="Maximum probability that a promise is wrong.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; default: the one of your own router for this model.")
    ] = None,
    forget: Annotated[str | None, typer.Option(help="Remove this tenant's kept prompts, and do nothing else.")] = None,
    as_json: opt.AsJson = False,
    *,
    load: opt.Load,
) -> None:
    """Certify a router's tiers again, on prompts of audited requests that `polar serve` kept.

    The tiers keep their promises, at new thresholds. A promise on right answers becomes one on answers that differ,
    since the right answers are unknown. Servers use the new certificate after a restart.
    """
    from polar_sdk.request.kept import KeptPrompts, kept_path
    from polar_sdk.router.artifact import load_router, model_of
    from polar_sdk.router.certificate import TierPromise
    from polar_sdk.router.learned import LearnedRouter
    from polar_sdk.router.store import router_folders, saved_router_path

    engine = load()
    kept = KeptPrompts(kept_path(engine.fingerprint), engine.decode)
    if forget is not None:
        print_line(f"removed {kept.forget(forget)} prompts of tenant {forget!r}; {len(kept)} are left.")
        return
    if not len(kept):
        raise DataError(
            f"no audited prompt of model {engine.name!r} is kept; name tenants whose prompts may be kept with "
            "`polar serve --audit-keep TENANT`, and wait for audits."
        )
    folders = (
        each for each in router_folders(engine.fingerprint, engine.dtype) if model_of(each) == engine.fingerprint
    )
    folder = router or next(folders, None)
    if folder is None:
        raise RouterError(f"model {engine.name!r} has no router.", hint="Make one with `polar fit`.")
    chosen = load_router(folder)
    certificate = chosen.certificate if isinstance(chosen, LearnedRouter) else None
    if certificate is None:
        raise RouterError(f"the router {str(folder)!r} promises nothing yet.", hint="Run `polar lab calibrate` first.")
    asked = {name: promise.asked for name, promise in certificate.tiers.items()}
    for name, promise in asked.items():
        if promise.loss == "harms":
            raise DataError(
                f"tier {name!r} has a promise on right answers turned wrong, which kept prompts cannot show; use "
                "`polar lab calibrate` with answers."
            )
    tiers = {
        name: TierPromise(alpha, "strict" if loss == "strict" else "differs", strict)
        for name, (alpha, loss, strict) in asked.items()
    }
    target = out or saved_router_path(engine.fingerprint, engine.dtype)
    with interruptible(), ProgressBars(quiet=as_json) as show:
        certified = lab.calibrate(
            engine,
            lab.read_items(kept.path),
            router=folder,
            tiers=tiers,
            delta=certificate.delta if delta is None else delta,
            out=target,
            on_progress=show,
        )
    show_certified(certified, target, [], as_json=as_json)
