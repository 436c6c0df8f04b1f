"""Usage and reports as CSV: exact figures, one header line, the charges of a report sum to its total.

A report has one row per tenant and tier, and one per tenant for its rounding line. Nothing is computed here.
"""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from polar_billing.reports.query import UsageRow
    from polar_billing.reports.report import Report, TenantReport, TierReport


_FIGURES = (
    "requests", "tokens_input", "tokens_cached", "tokens_output",
    "compute_units", "compute_units_full_depth", "compute_units_saved", "saved_share", "router_share",
    "charge", "charge_full_depth", "charge_per_token", "price_per_1000_requests", "price_per_million_tokens",
    "latency_ns_p50", "latency_ns_p95", "latency_ns_p99",
)  # fmt: skip
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
            {
                **row.group,
                **{name: getattr(row, name) for name in figures},
                "unrated": sum(row.unrated.values()),
                **{outcome: row.outcomes.get(outcome, 0) for outcome in _OUTCOMES},
            }
            for row in rows
        ),
    )


def report_csv(report: Report) -> str:
    """One row per tenant and tier, and per tenant's rounding line."""
    header = ["since", "until", "tenant", "kind", "tier", "currency", *_FIGURES, "unrated", *_OUTCOMES]
    return write_rows(header, (row for tenant in report.tenants for row in _tenant(tenant, report)))


def _tenant(tenant: TenantReport, report: Report) -> Iterable[dict[str, Any]]:
    common = {
        "since": report.since and report.since.isoformat(),
        "until": report.until and report.until.isoformat(),
        "tenant": tenant.tenant,
        "currency": report.currency,
    }
    for tier in tenant.tiers:
        yield {**common, "kind": "tier", **_tier(tier)}
    yield {**common, "kind": "rounding", "charge": tenant.rounding}


def _tier(tier: TierReport) -> dict[str, Any]:
    figures = tier.figures
    return {
        "tier": tier.tier,
        **{name: getattr(figures, name) for name in _FIGURES},
        "unrated": sum(figures.unrated.values()),
        **{outcome: figures.outcomes.get(outcome, 0) for outcome in _OUTCOMES},
    }


def write_rows(header: list[str], rows: Iterable[dict[str, Any]]) -> str:
    """Rows as CSV text with one header line; a column that a row lacks is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, header, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return out.getvalue()


def _cell(value: Any) -> str:
    """A cell as text; a text that a spreadsheet would run as a formula gets an apostrophe before it."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return f"{value:f}" if hasattr(value, "as_tuple") else str(value)
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
