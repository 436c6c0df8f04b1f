"""Usage, reports, statements and repricings as CSV: exact figures and one header line. Computes nothing."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from polar_sdk.show.lines import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from polar_billing.reports.query import UsageRow
    from polar_billing.reports.report import Report
    from polar_billing.statements.issue import CreditNote
    from polar_billing.statements.period import Repriced
    from polar_billing.statements.statement import Statement


_FIGURES = (
    "requests", "tokens_input", "tokens_cached", "tokens_output",
    "compute_units", "compute_units_prompt", "compute_units_answer", "compute_units_router",
    "compute_units_full_depth", "compute_units_saved", "saved_share", "router_share",
    "charge", "charge_full_depth", "charge_per_token", "price_per_1000_requests", "price_per_million_tokens",
    "latency_ns_p50", "latency_ns_p95", "latency_ns_p99",
)  # fmt: skip
_LINE = (
    "number", "kind", "tier", "item", "quantity", "unit", "unit_price", "amount", "since", "until", "outcome", "note",
    "corrects",
)  # fmt: skip
_REPRICED = ("tenant", "requests", "currency", "price_book", "charged", "other_price_book", "other", "difference")
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\N{REPLACEMENT CHARACTER}")
"""First characters that some program takes for a formula; the last one stands for a tab or a line break."""
_OUTCOMES = ("completed", "cancelled", "error", "cached")


def usage_csv(rows: Sequence[UsageRow]) -> str:
    """One row per group; the group's dimensions are the first columns."""
    dimensions = list(rows[0].group) if rows else []
    figures = (
        "requests", "tokens_input", "tokens_cached", "tokens_output", "visits", "flops",
        "compute_units", "compute_units_saved", "cost", "currency",
    )  # fmt: skip
    header = [*dimensions, *figures, "unrated", *_OUTCOMES]
    return write_rows(
        header,
        (
            {**row.group, **{name: getattr(row, name) for name in figures}, **_endings(row.unrated, row.outcomes)}
            for row in rows
        ),
    )


def report_csv(report: Report) -> str:
    """The rows of `report_rows`."""
    header, rows = report_rows(report)
    ends = ("since", "until")
    return write_rows(header, ({**row, **{end: row[end] and row[end].isoformat() for end in ends}} for row in rows))


def report_rows(report: Report) -> tuple[list[str], Iterable[dict[str, Any]]]:
    """The columns, and one row per tenant and tier and one per tenant for its rounding line.

    The charges sum to the report's total; a column that a row lacks is empty.
    """
    header = ["since", "until", "tenant", "kind", "tier", "currency", *_FIGURES, "unrated", *_OUTCOMES]
    rows: list[dict[str, Any]] = []
    for tenant in report.tenants:
        common = {"since": report.since, "until": report.until, "tenant": tenant.tenant, "currency": report.currency}
        for tier in tenant.tiers:
            figures = {name: getattr(tier.figures, name) for name in _FIGURES}
            ended = _endings(tier.figures.unrated, tier.figures.outcomes)
            rows.append({**common, "kind": "tier", "tier": tier.tier, **figures, **ended})
        rows.append({**common, "kind": "rounding", "charge": tenant.rounding})
    return header, rows


def _endings(unrated: Mapping[str, int], outcomes: Mapping[str, int]) -> dict[str, int]:
    return {"unrated": sum(unrated.values()), **{outcome: outcomes.get(outcome, 0) for outcome in _OUTCOMES}}


def statement_csv(statement: Statement, notes: Iterable[CreditNote] = ()) -> str:
    """One row per line, and per credit note; the amounts of all rows sum to what is due."""
    rows: list[dict[str, Any]] = [{name: getattr(line, name) for name in _LINE} for line in statement.lines]
    rows.append({"kind": "rounding", "amount": statement.rounding})
    rows += [
        {"kind": "prepaid", "item": use.id, "amount": use.used.copy_negate()} for use in statement.credits if use.used
    ]
    rows += [
        {"kind": "credit note", "item": note.reference, "amount": note.amount.copy_negate(), "note": note.reason}
        for note in notes
    ]
    common = {"statement": statement.id, "tenant": statement.tenant, "currency": statement.currency}
    return write_rows([*common, *_LINE], ({**common, **row} for row in rows))


def repriced_csv(rows: Sequence[Repriced]) -> str:
    """One row per tenant."""
    return write_rows(list(_REPRICED), ({name: getattr(row, name) for name in _REPRICED} for row in rows))


def write_rows(header: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV text with one header line; a column that a row lacks is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, header, restval="", lineterminator="\n")
    writer.writerow({name: _cell(name) for name in header})
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return out.getvalue()


def _cell(value: Any) -> str:
    """A cell on one line of text; one that a spreadsheet would run as a formula gets an apostrophe in front."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return f"{value:f}" if hasattr(value, "as_tuple") else str(value)
    value = printable(value)
    return f"'{value}" if value.lstrip().startswith(_FORMULA) else value
