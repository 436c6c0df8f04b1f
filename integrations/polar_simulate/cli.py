"""The command `polar simulate`. Heavy imports wait until it runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from platformdirs import user_data_path

from polar_sdk.cli import options as opt
from polar_sdk.errors import DataError, InvalidRequestError, MissingExtraError, PolarError
from polar_sdk.reading import shown
from polar_sdk.show.lines import print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk import PolarModel
    from polar_sdk.show.progress import Progress
    from polar_simulate.capacity import Speed
    from polar_simulate.comparison import Comparison
    from polar_simulate.day import Day
    from polar_simulate.soak import Soaked

FIGURES: Final = "simulate.json"
_INTERRUPTED: Final = 130
_MAX_REQUESTS: Final = 1_000_000


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: polar simulate --requests 300 --seeds 3 --output ./simulated")(simulate)


def simulate(
    requests: Annotated[int, typer.Option(min=1, max=_MAX_REQUESTS, help="Requests of a day.")] = 300,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Days to replay, each with a seed of its own.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first day.")] = 0,
    load: Annotated[
        float | None,
        typer.Option(help="Load in the busiest moment, as a share of what is measured at full depth; default: 0.7."),
    ] = None,
    factor: Annotated[
        float | None, typer.Option(help="Run the day so many times as fast as the clock, instead of --load.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Draw prompts from this JSONL file: prompt, and if you like tenant, tier, max_tokens."),
    ] = None,
    soak: Annotated[
        float | None, typer.Option(help="Keep the load up for so many minutes, routed, and watch memory and ledger.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for ledgers and figures; default: in your data folder.")
    ] = None,
    as_json: opt.AsJson = False,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the layers first, if they are not yet.")] = False,
    model: opt.Model = None,
    device: opt.Device = "auto",
    precision: opt.Precision = "auto",
    policy: opt.PolicyFile = None,
    router: opt.RouterFolder = None,
) -> None:
    """Replay a day of a messaging service, faster than the clock: full depth beside routed, in one table.

    Phrases, idioms and long messages of several tenants and tiers arrive at random times and run through engine,
    router, budgets and ledgers of their own. Latency, FLOPs and cost per 1,000 requests are measured on this machine;
    what is assumed is printed with them. Ctrl-C ends it with what there is.
    """
    _check_numbers(load, factor, soak, seeds)
    try:
        from polar_billing import PriceBook
        from polar_simulate.assumptions import assumptions, busy_before
        from polar_simulate.day import Day
        from polar_simulate.prompt_file import read_prompts
        from polar_simulate.views import view_of
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"polar simulate needs the package {(error.name or 'sqlalchemy').partition('.')[0]!r}.",
            hint="In a clone: `pip install '.[billing]'`.",
        ) from error
    day = Day(requests, seed, read_prompts(prompts) if prompts is not None else [])
    book = PriceBook.load()
    folder = (output or user_data_path("polar", appauthor=False) / "simulate").expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    busy = busy_before()
    how = "stored" if not compile else True
    engine = _model(model, device=device, precision=precision, policy=policy, router=router, compile=how)
    _check_day(engine, day)
    result = _run(engine, day, range(seed, seed + seeds), load, factor, soak, folder, quiet=as_json)
    assumed = assumptions(engine, result.speed, day, book, busy)
    figures = {"assumptions": assumed, **result.as_json()}
    (folder / FIGURES).write_text(json.dumps(figures, indent=1, ensure_ascii=False), encoding="utf-8")
    if as_json:
        print_json(figures)
    else:
        _print(view_of(result, assumed))
    _end(result)


def _check_numbers(load: float | None, factor: float | None, soak: float | None, seeds: int) -> None:
    if load is not None and factor is not None:
        raise InvalidRequestError("--load and --factor both say how fast the day runs; give one of them.")
    if soak is not None and not 0 < soak < math.inf:
        raise InvalidRequestError(f"--soak {soak} is out of range; use minutes above 0.")
    if soak is not None and seeds > 1:
        raise InvalidRequestError(f"--soak and --seeds {seeds} do not go together; a soak runs one day after another.")


def _model(name: str | None, **options: Any) -> PolarModel:
    """The model, without a ledger: each trial has its own."""
    from polar_sdk import PolarModel

    return PolarModel.from_pretrained(name, ledger=None, **options)


def _check_day(engine: PolarModel, day: Day) -> None:
    """Find out before anything runs whether the model has the tiers of the day and takes its prompts.

    Raises:
        DataError: A prompt of the user's file cannot run.
        PolarError: A tier of the scenario does not exist.
    """
    from polar_simulate.day import TENANTS
    from polar_simulate.trial import FULL_DEPTH

    for tier in dict.fromkeys([FULL_DEPTH, *(tier for sender in TENANTS for tier in sender.tiers)]):
        engine.bound("Hello", compute=tier, max_tokens=1)
    for own in day.prompts:
        try:
            engine.bound(own.prompt, compute=own.tier or FULL_DEPTH, max_tokens=own.max_tokens, tenant=own.tenant)
        except PolarError as error:
            raise DataError(f"the prompt {shown(own.prompt)} cannot run: {error}") from error


def _speed(engine: PolarModel, day: Day, load: float | None, factor: float | None, progress: Progress) -> Speed:
    """How fast the day runs: as asked for, or as the measured capacity has it."""
    from polar_simulate.capacity import Speed, check_load, measure_capacity, unshared_starts

    if factor is not None:
        return Speed.given(factor, day.requests)
    wanted = 0.7 if load is None else load
    check_load(wanted)
    with unshared_starts(engine):
        capacity = measure_capacity(
            engine, day.prompts, lambda done, total: progress("capacity at full depth", done, total)
        )
    return Speed.of_load(wanted, day.requests, capacity)


def _run(
    engine: PolarModel,
    day: Day,
    seeds: Sequence[int],
    load: float | None,
    factor: float | None,
    minutes: float | None,
    folder: Path,
    *,
    quiet: bool,
) -> Comparison | Soaked:
    """The simulation itself, under bars of progress."""
    from polar_sdk.show.progress import ProgressBars
    from polar_simulate.comparison import compare
    from polar_simulate.soak import soak

    with ProgressBars(quiet=quiet) as progress:
        speed = _speed(engine, day, load, factor, progress)
        if minutes is None:
            return compare(engine, folder, speed, seeds, progress, day.prompts)
        return soak(engine, folder, speed, minutes, progress, seed=day.seed, prompts=day.prompts)


def _print(view: Any) -> None:
    from polar_billing.cli.options import show

    show(view)


def _end(result: Comparison | Soaked) -> None:
    """Exit with what is amiss, or with the code of Ctrl-C.

    Raises:
        LedgerUnsoundError: A ledger is not as it must be.
    """
    from polar_billing import LedgerUnsoundError

    if result.faults:
        more = f" {len(result.faults) - 1} more are in the figures." if len(result.faults) > 1 else ""
        raise LedgerUnsoundError(f"what was simulated does not agree with its ledger: {result.faults[0]}{more}")
    if result.interrupted:
        raise typer.Exit(_INTERRUPTED)
