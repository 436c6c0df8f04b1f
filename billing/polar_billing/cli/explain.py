"""The command `polar explain`.

Arguments in, text out; the work is done by `reports.explanation`. The sizes of the model come from the engine, if it
has the model on this host; without them, everything else is explained.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polar_billing.cli import options as opt
from polar_sdk.errors import PolarError

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_sdk.programs.cost import CostModel
    from polar_sdk.usage import UsageRecord


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("explain", epilog="Example: polar explain 0193e1a2 --tenant acme")(explain)


def explain(
    what: Annotated[
        str, typer.Argument(help="Id of a request, or a line of an issued statement: st-…/1.", metavar="REQUEST|LINE")
    ],
    ledger: opt.Ledger = None,
    tenant: Annotated[
        str | None, typer.Option(help="Whose, where several have such a request.", metavar="NAME")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Meter that stored the request.", metavar="NAME")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the model, if the name in the record does not lead to it.", metavar="NAME"
        ),
    ] = None,
    router: Annotated[
        Path | None,
        typer.Option(help="Folder of the router whose bridges and fills the program uses.", metavar="FOLDER"),
    ] = None,
    records: Annotated[int, typer.Option(min=0, help="Number of usage records of a line to list.")] = 20,
    as_json: opt.Json = False,
) -> None:
    """Explain an amount: line → usage records; request → layers → FLOPs as products → price → receipt and chain.

    The FLOPs of a request are taken apart if its model is on this host; nothing is fetched, and no weights are loaded.
    """
    with opt.existing_ledger(ledger) as store:
        from polar_billing.reports.explanation import explain_line, explain_request, is_line_id
        from polar_billing.reports.explanation_views import line_view, request_view

        if is_line_id(what):
            line = explain_line(store, what, tenant=tenant, records=records)
            opt.show_json(line.model_dump(mode="json")) if as_json else opt.show(line_view(line))
            return
        request = explain_request(store, what, tenant=tenant, source=source, costs=_costs(model, router))
        opt.show_json(request.model_dump(mode="json")) if as_json else opt.show(request_view(request))


def _costs(model: str | None, router: Path | None) -> Callable[[UsageRecord], CostModel | str]:
    """Finds the sizes of a record's model; what was named and cannot be used is an error, and else a reason."""

    def find(record: UsageRecord) -> CostModel | str:
        try:
            from polar_sdk.router.costs import stored_costs

            return stored_costs(model or record.model, record.model_fingerprint, router)
        except (PolarError, ImportError) as error:
            if model is not None:
                raise
            return str(error)

    return find
