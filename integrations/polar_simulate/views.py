"""Tables of what was simulated, for the terminal. Knows how figures look, not how they come about."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from rich.console import Group

from polar_billing.reports.amounts import unit_for
from polar_sdk.show.tables import add_numbers, add_row, as_text, new_table
from polar_simulate.comparison import Comparison
from polar_simulate.trial import PERCENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import RenderableType
    from rich.table import Table

    from polar_billing.reports.amounts import Unit
    from polar_simulate.audit import Share
    from polar_simulate.soak import Soaked
    from polar_simulate.trial import Trial

DASH: Final = "–"
Number = int | float | Decimal
_MIB: Final = 2**20


@dataclass(frozen=True)
class Figure:
    """A row of the table: a figure of each trial, how it looks, and how two of them are compared."""

    name: str
    of: Callable[[Trial], Number | None]
    show: Callable[[Number], str]
    compare: Callable[[float, float], str] | None = None


def view_of(result: Comparison | Soaked, assumed: Sequence[str]) -> RenderableType:
    """What a simulation found, with what it assumed."""
    return comparison_view(result, assumed) if isinstance(result, Comparison) else soak_view(result, assumed)


def comparison_view(comparison: Comparison, assumed: Sequence[str]) -> RenderableType:
    """Full depth beside routed, the tiers of the routed trials, what is assumed, and the ledgers."""
    return Group(
        _both_ways(comparison), as_text(""), _tiers(comparison), as_text(""), *_assumed(assumed), *_ledgers(comparison)
    )


def soak_view(soaked: Soaked, assumed: Sequence[str]) -> RenderableType:
    """What came of a soak."""
    trial = soaked.trial
    table = new_table(f"Soak of {trial.seconds / 60:,.1f} minutes{_cut(trial.interrupted)}", ["what"])
    add_numbers(table, "routed")
    for figure in _figures(_unit([trial])):
        add_row(table, figure.name, _cell(figure, [trial]))
    sizes = [size for _, size in soaked.memory]
    drift = "too short to say" if soaked.drift is None else f"{soaked.drift:+.1%}"
    add_row(table, "memory at the end against the beginning", drift)
    add_row(table, "memory, MiB", f"{min(sizes) / _MIB:,.0f} to {max(sizes) / _MIB:,.0f}")
    return Group(table, as_text(""), *_assumed(assumed), _ledger_line(trial))


def _both_ways(comparison: Comparison) -> Table:
    seeds = ", ".join(map(str, comparison.seeds))
    ranges = "; mean [least, most] of the seeds" if len(comparison.seeds) > 1 else ""
    title = f"A day of {comparison.speed.requests:,} requests, seed {seeds}{ranges}{_cut(comparison.interrupted)}"
    table = new_table(title, ["what"])
    add_numbers(table, "full depth", "routed", "difference")
    full, routed = comparison.full, comparison.routed
    for figure in _figures(_unit(comparison.trials)):
        means = [_mean(_values(figure, trials)) for trials in (full, routed)]
        apart = ""
        if figure.compare is not None and means[0] is not None and means[1] is not None:
            apart = figure.compare(means[0], means[1])
        add_row(table, figure.name, _cell(figure, full), _cell(figure, routed), apart)
    for error in sorted({error for trial in comparison.trials for error in trial.tally.errors}):
        add_row(table, f"failed: {error}", *(_errors(trials, error) for trials in (full, routed)), "")
    same = comparison.same_answers()
    add_row(table, "same answers as at full depth", DASH, _range(same, _percent), "")
    return table


def _figures(unit: Unit) -> list[Figure]:
    money = _money(unit)
    return [
        Figure("requests sent", lambda trial: trial.tally.sent, _count),
        Figure("answered", lambda trial: trial.tally.ends["answered"], _count),
        Figure("refused by a budget", lambda trial: trial.tally.ends["refused"], _count),
        Figure("refused by a full queue", lambda trial: trial.tally.ends["queue full"], _count),
        Figure("cancelled or failed", lambda trial: trial.tally.ends["cancelled"] + trial.tally.ends["failed"], _count),
        *(
            Figure(f"latency p{percent}, s", _latency(percent), lambda value: f"{value:,.2f}", _relative)
            for percent in PERCENTS
        ),
        Figure("answered per second", _throughput, lambda value: f"{value:,.2f}"),
        Figure("input tokens per request", lambda t: _each(t, t.audit.figures.tokens_input), lambda v: f"{v:,.1f}"),
        Figure("output tokens per request", lambda t: _each(t, t.audit.figures.tokens_output), lambda v: f"{v:,.1f}"),
        Figure("TFLOP", lambda trial: trial.audit.figures.flops / 1e12, lambda value: f"{value:,.3f}"),
        Figure("GFLOP per request", _gflop, lambda value: f"{value:,.3f}", _relative),
        Figure("FLOPs saved against full depth", lambda trial: trial.audit.figures.saved, _percent),
        Figure(f"{unit.name} per 1,000 requests", lambda t: t.audit.figures.cost_per_1000, money, _relative),
        Figure("  the same at one price", lambda t: t.audit.figures.cost_one_price_per_1000, money, _relative),
    ]


def _tiers(comparison: Comparison) -> Table:
    """The routed trials by tier."""
    unit = _unit(comparison.trials)
    table = new_table(f"Routed, by tier{'; means' if len(comparison.seeds) > 1 else ''}", ["tier"])
    latencies = [f"p{percent}, s" for percent in PERCENTS]
    add_numbers(table, "requests", *latencies, "FLOPs saved", f"{unit.name} per 1,000", "same answers")
    for tier in dict.fromkeys(tier for trial in comparison.routed for tier in trial.audit.by_tier):
        shares = [trial.audit.by_tier[tier] for trial in comparison.routed if tier in trial.audit.by_tier]

        def column(of: Callable[[Share], Number | None], show: Callable[[Number], str], shares: list[Share]) -> str:
            mean = _mean([value for share in shares if (value := of(share)) is not None])
            return DASH if mean is None else show(mean)

        add_row(
            table,
            tier,
            column(lambda share: share.requests, _count, shares),
            *(column(_latency_of(percent), lambda value: f"{value:,.2f}", shares) for percent in PERCENTS),
            column(lambda share: share.saved, _percent, shares),
            column(lambda share: share.cost_per_1000, _money(unit), shares),
            DASH if (same := _mean(comparison.same_answers(tier))) is None else _percent(same),
        )
    return table


def _money(unit: Unit) -> Callable[[Number], str]:
    return lambda value: unit.show(round(Decimal(value), unit.exponent + 3))


def _latency_of(percent: int) -> Callable[[Share], float | None]:
    return lambda share: share.latency(percent)


def _latency(percent: int) -> Callable[[Trial], float | None]:
    return lambda trial: trial.audit.figures.latency(percent)


def _throughput(trial: Trial) -> float:
    return trial.tally.ends["answered"] / trial.seconds if trial.seconds else 0.0


def _gflop(trial: Trial) -> float | None:
    flops = trial.audit.figures.flops_per_request
    return None if flops is None else flops / 1e9


def _each(trial: Trial, count: int) -> float | None:
    requests = trial.audit.figures.requests
    return count / requests if requests else None


def _unit(trials: Sequence[Trial]) -> Unit:
    currency = trials[0].book.currency if trials else None
    return unit_for([trial.audit.figures.cost_per_1000 for trial in trials], currency)


def _values(figure: Figure, trials: Sequence[Trial]) -> list[Number]:
    return [value for trial in trials if (value := figure.of(trial)) is not None]


def _cell(figure: Figure, trials: Sequence[Trial]) -> str:
    return _range(_values(figure, trials), figure.show)


def _range(values: Sequence[Number], show: Callable[[Number], str]) -> str:
    """The mean and the range of the seeds; one value alone as it is."""
    mean = _mean(values)
    if mean is None:
        return DASH
    if len(values) == 1:
        return show(values[0])
    return f"{show(mean)} [{show(min(values))}, {show(max(values))}]"


def _mean(values: Sequence[Number]) -> float | None:
    return float(sum(map(Decimal, values))) / len(values) if values else None


def _errors(trials: Sequence[Trial], error: str) -> str:
    return _count(sum(trial.tally.errors[error] for trial in trials))


def _count(value: Number) -> str:
    return f"{value:,.0f}"


def _percent(value: Number) -> str:
    return f"{round(float(value), 3) + 0.0:.1%}"


def _relative(before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}" if before else DASH


def _cut(interrupted: bool) -> str:
    return " · interrupted" if interrupted else ""


def _assumed(assumed: Sequence[str]) -> list[RenderableType]:
    return [as_text("Assumed and stated", "bold"), *(as_text(f"- {line}") for line in assumed), as_text("")]


def _ledgers(comparison: Comparison) -> list[RenderableType]:
    return [_ledger_line(trial) for trial in comparison.trials]


def _ledger_line(trial: Trial) -> RenderableType:
    found = trial.audit
    must = len(trial.tally.admitted)
    state = "NOT sound" if found.faults else "sound"
    late = f"sent at most {trial.tally.latest * 1e3:,.0f} ms late"
    return as_text(
        f"{trial.ledger}: {state}, {found.links:,} links verified; {must:,} requests admitted, "
        f"{found.figures.requests:,} records stored; {late}"
    )
