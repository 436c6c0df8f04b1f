"""The commands `polar usage` and `polar explain`.

Arguments in, text out; the figures come from `reports`. The engine knows the sizes of the model that served a request,
if that is on this host; without them, everything but the FLOPs is explained.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polar_billing.cli import options as opt
from polar_billing.errors import QueryError
from polar_sdk.errors import PolarError
from polar_sdk.show.lines import print_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import Selection
    from polar_sdk.programs.cost import CostModel
    from polar_sdk.usage import UsageRecord


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(
        "usage",
        epilog="Example: polar usage --tenant acme --month 2026-11 --by day --by tier",
    )(usage)
    app.command("explain", epilog="Example: polar explain 01a21448-fc9b-79f1-b119-920a961c1e1e")(explain)


def usage(
    ledger: opt.Ledger = None,
    tenant: opt.Tenant = None,
    month: opt.Month = None,
    since: opt.Since = None,
    until: opt.Until = None,
    zone: opt.Zone = "UTC",
    tier: opt.Tier = None,
    model: Annotated[str | None, typer.Option(help="Only this model.", metavar="NAME")] = None,
    tag: Annotated[
        list[str] | None, typer.Option(help="Only requests with this tag; may be repeated.", metavar="KEY=VALUE")
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="Group by tenant, tier, model, program, outcome, day, month, tag:KEY, …; may be repeated.",
            metavar="WHAT",
        ),
    ] = None,
    requests: Annotated[bool, typer.Option("--requests", help="List single requests, the latest first.")] = False,
    last: Annotated[int, typer.Option(min=1, help="Number of requests that --requests lists.")] = 20,
    prices: opt.Prices = None,
    currency: opt.Currency = None,
    as_json: opt.Json = False,
    csv: opt.Csv = None,
) -> None:
    """Show who used what: requests, tokens, layer visits, compute units and cost.

    By default, it covers every tenant and all time.
    """
    selection = opt.selection_of(tenant, opt.period_of(month, since, until, zone), tier, model, tag or [])
    if requests and (by or prices or currency or csv):
        raise QueryError(
            "--requests lists single requests, and cannot be combined with --by, --prices, --currency or --csv.",
            hint="Leave out either.",
        )
    with opt.open_ledger(ledger) as store:
        if requests:
            _show_requests(store, selection, last, as_json)
            return
        from polar_billing.reports.csv import usage_csv
        from polar_billing.reports.query import usage_rows
        from polar_billing.reports.usage_tables import usage_view

        groups = by or ["tenant", "tier"]
        rows = usage_rows(store, selection, by=groups, prices=opt.book_of(prices), currency=currency)
        if csv is not None:
            opt.write_file(csv, usage_csv(rows))
        if as_json:
            print_json([row.model_dump(mode="json") for row in rows])
        elif not rows:
            opt.say_nothing_found(store, selection)
        elif csv is None:
            opt.show(usage_view(rows, title=f"Usage, {selection.period.label}"))


def _show_requests(store: Ledger, selection: Selection, last: int, as_json: bool) -> None:
    from polar_billing.reports.usage_tables import requests_view

    requests = list(store.read(selection, newest=last))
    currencies = {digest: book.currency for digest, book in store.price_books().items()}
    if as_json:
        print_json(
            [
                {
                    "seq": stored.seq,
                    "stored_at": stored.stored_at.isoformat(),
                    "cost": None if stored.cost is None else f"{stored.cost:f}",
                    "currency": currencies[stored.price_book_hash],
                    "unrated": stored.unrated,
                    **stored.record.model_dump(mode="json"),
                }
                for stored in requests
            ]
        )
    elif not requests:
        opt.say_nothing_found(store, selection)
    else:
        opt.show(requests_view(requests, title=f"The last {len(requests)} requests", currencies=currencies))


def explain(
    what: Annotated[
        str,
        typer.Argument(
            help="Id of a request, or its first 6 characters or more; or a line of an issued statement: st-…/1.",
            metavar="REQUEST|LINE",
        ),
    ],
    ledger: opt.Ledger = None,
    tenant: Annotated[
        str | None, typer.Option(help="Its tenant, if several have a request of this id.", metavar="NAME")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Meter that stored the request.", metavar="NAME")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the model, if it is not found by the name in the record.", metavar="NAME"
        ),
    ] = None,
    router: Annotated[
        Path | None,
        typer.Option(help="Folder of the router with the program's bridges and fills.", metavar="FOLDER"),
    ] = None,
    records: Annotated[int, typer.Option(min=0, help="Number of usage records of a line to list.")] = 20,
    as_json: opt.Json = False,
) -> None:
    """Explain an amount: line → usage records; request → layers → FLOPs as products → price → receipt and chain.

    The FLOPs of a request are itemized if its model is on this host; nothing is fetched, and no weights are loaded.
    """
    with opt.existing_ledger(ledger) as store:
        from polar_billing.reports.explanation import explain_line, explain_request, is_line_id
        from polar_billing.reports.explanation_views import line_view, request_view

        if is_line_id(what):
            line = explain_line(store, what, tenant=tenant, records=records)
            print_json(line.model_dump(mode="json")) if as_json else opt.show(line_view(line))
            return
        request = explain_request(store, what, tenant=tenant, source=source, costs=_costs(model, router))
        print_json(request.model_dump(mode="json")) if as_json else opt.show(request_view(request))


def _costs(model: str | None, router: Path | None) -> Callable[[UsageRecord], CostModel | str]:
    """Find the sizes of a record's model; if a named model cannot be used, that is an error, else a reason."""

    def find(record: UsageRecord) -> CostModel | str:
        try:
            from polar_sdk.router.store import stored_costs

            return stored_costs(model or record.model, record.model_fingerprint, router)
        except (PolarError, ImportError) as error:
            if model is not None:
                raise
            return str(error)

    return find
