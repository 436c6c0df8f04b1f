"""The command `polar drift`. Arguments in, text out; the figures come from `reports.drift`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from polar_billing.cli import options as opt
from polar_billing.cli.report import certified
from polar_sdk.show.lines import print_json, print_line

if TYPE_CHECKING:
    from decimal import Decimal

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import Selection

_WEEK = timedelta(days=7)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("drift", epilog="Example: polar drift --by kind")(drift)


def drift(
    ledger: opt.Ledger = None,
    since: opt.Since = None,
    until: opt.Until = None,
    zone: opt.Zone = "UTC",
    tier: opt.Tier = None,
    by: Annotated[str, typer.Option(help="Tag that names the kind of a request.", metavar="TAG")] = "kind",
    as_json: opt.Json = False,
) -> None:
    """Show whether audits contradict what tiers promise, and what tiers saved by kind and length.

    For each promise: its state, audits, the share of lost answers with its interval, and each change of the state.
    Savings are those of the last seven days unless a period is given.
    """
    period = opt.period_of(None, since, until, zone)
    with opt.open_ledger(ledger) as store:
        from polar_billing.reports.drift import promises_of, saved_by
        from polar_billing.reports.usage_tables import promises_view, saved_view
        from polar_billing.values.periods import Period

        if since is None and until is None:
            now = datetime.now(UTC)
            period = Period(now - _WEEK, None, zone)
        selection = opt.selection_of(None, period, tier, None, [])
        with store.snapshot() as connection:
            promises = promises_of(connection, {})
            saved = saved_by(connection, selection, by, _savings(store, selection))
    promises = tuple(one for one in promises if tier in {None, one.tier})
    if as_json:
        print_json(
            {
                "promises": [one.model_dump(mode="json") for one in promises],
                "saved": [one.model_dump(mode="json") for one in saved],
                "by": by,
            }
        )
        return
    if promises:
        opt.show(promises_view(promises))
    else:
        print_line("No promise was audited yet.")
    if saved:
        opt.show(saved_view(saved, by, "the last seven days" if since is None and until is None else period.label))


def _savings(store: Ledger, selection: Selection) -> dict[str, Decimal]:
    """Savings in calibration of the tiers of the one model of the usage; nothing if there are several models."""
    usage = next(store.read(selection, newest=1), None)
    measured = None if usage is None else certified(usage.record.model_fingerprint)
    return {} if measured is None else {tier: one.saved for tier, one in measured.items()}
