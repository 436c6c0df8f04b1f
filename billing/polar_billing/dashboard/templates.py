"""The page as HTML: templates, figures as text, and the files that go with it. Needs the extra `report` (jinja2).

The page has no inline style or script, so that it works where these are refused. Names are escaped, control characters
and marks that change the direction of text are replaced, and long names are cut only if the whole name is shown
elsewhere. Does not read the ledger.
"""

from __future__ import annotations

import hashlib
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from polar_billing.dashboard.layers import SHAPES
from polar_billing.reports import text
from polar_billing.reports.depth import WORDS, layers_of_record
from polar_billing.reports.html import new_environment, read_template
from polar_billing.reports.text import Amounts, unit_for
from polar_billing.reports.usage_tables import length
from polar_billing.values.money import exact_sum
from polar_billing.values.periods import load_zone
from polar_sdk.show.lines import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from polar_billing.dashboard.view import Receipt, View
    from polar_billing.ledger.records import StoredUsage
    from polar_billing.reports.summary import Figures
    from polar_billing.reports.text import Unit
    from polar_billing.values.periods import Period
    from polar_sdk.usage import UsageRecord

_HERE: Final = "polar_billing.dashboard"
_REPORTS: Final = "polar_billing.reports"
MAX_TENANTS: Final = 20
"""In the table of today's cost; its total is of all."""
MAX_BUDGETS: Final = 20
MAX_KEYS: Final = 40
MAX_PROMISES: Final = 12
MAX_KINDS: Final = 20
SECTIONS: Final = {
    "now": "Now",
    "health": "Health",
    "audits": "Promises",
    "charges": "Cost today",
    "programs": "Programs",
    "requests": "Requests",
    "budgets": "Budgets",
    "keys": "Keys",
}
KINDS: Final = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
"""The files that go with the page, and what they are."""


class Templates:
    """Renders the page and what belongs to it."""

    def __init__(self) -> None:
        self._environment = new_environment(_HERE, "the operations page")
        self._environment.filters.update(_FILTERS)
        self._environment.globals.update(
            version=self.version,
            shapes=SHAPES,
            kind_words=WORDS,
            saved=_saved,
            saved_share=_saved_share,
            sections=list(SECTIONS.items()),
            max_tenants=MAX_TENANTS,
            max_keys=MAX_KEYS,
            length=length,
        )

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Style sheet, script and icon, by name; the style sheet begins with that of the report."""
        style = read_template(_REPORTS, "style.css") + read_template(_HERE, "page.css")
        return {
            "page.css": style.encode(),
            **{name: read_template(_HERE, name).encode() for name in ("page.js", "icon.svg")},
        }

    @cached_property
    def version(self) -> str:
        """Changes whenever one of the files does."""
        return hashlib.sha256(b"".join(self.files.values())).hexdigest()[:12]

    def operations(self, view: View) -> str:
        """The whole page."""
        today_units = exact_sum((charges.figures.compute_units for charges in view.charges), 12)
        units = {charges.currency: Amounts.of(charges).charges for charges in view.charges}
        tiers = view.charges[0].tiers if len(view.charges) == 1 else ()
        costs: dict[str, list[Decimal | None]] = {}
        for stored in view.requests:
            costs.setdefault(view.book_of(stored).currency, []).append(stored.cost)
        cost_units = {currency: unit_for(amounts, currency) for currency, amounts in costs.items()}
        return self._environment.get_template("operations.html.jinja").render(
            base="",
            view=view,
            units=units,
            # Those with the smallest share left.
            budgets=sorted(view.budgets, key=lambda one: one.left / max(one.budget.limit_count, 1))[:MAX_BUDGETS],
            # Those at risk first, and of the kinds those with the most requests.
            promises=sorted(view.promises, key=lambda one: one.state == "in force")[:MAX_PROMISES],
            week=sorted(view.week or (), key=lambda one: -one.requests)[:MAX_KINDS],
            today_units=today_units,
            today_requests=sum(charges.figures.requests for charges in view.charges),
            # By tier, where there is one currency.
            saved_today={tier.tier: tier.figures.saved_share for tier in tiers}.get,
            cost_of=lambda stored: _cost(stored, cost_units[view.book_of(stored).currency]),
            ago=lambda moment: _seconds(max((view.at - moment).total_seconds(), 0.0)),
            served=lambda moment: _served(view.today, moment),
            **_times(view.today.zone),
        )

    def receipt(self, found: Receipt, zone: str) -> str:
        """The page of one request."""
        record = found.stored.record
        return self._environment.get_template("receipt.html.jinja").render(
            base="../",
            found=found,
            rows=list(_rows(found.receipt)),
            facts=list(_facts(record, zone)),
            layers=layers_of_record(record),
            **_times(zone),
        )

    def error(self, title: str, message: str, base: str = "") -> str:
        """A page that says what is wrong."""
        return self._environment.get_template("error.html.jinja").render(base=base, title=title, message=message)


def _cost(stored: StoredUsage, unit: Unit) -> str:
    return text.DASH if stored.cost is None else f"{unit.show(stored.cost)} {unit.name}"


def _saved(figures: Figures, unit: Unit) -> str:
    """The charge at full depth less the charge, with its sign."""
    if figures.charge is None or figures.charge_full_depth is None:
        return text.DASH
    return unit.show(figures.charge_full_depth - figures.charge, signed=True)


def _saved_share(record: UsageRecord) -> Decimal | None:
    return Decimal(record.flops_saved) / record.identity_flops if record.identity_flops else None


def _rows(receipt: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The fields of a receipt, the chain's with its name before them."""
    for name, value in receipt.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{part}", str(each)) for part, each in value.items())
        else:
            yield name, text.DASH if value is None else str(value)


def _facts(record: UsageRecord, zone: str) -> Iterator[tuple[str, str]]:
    """The facts of a record, in words."""
    yield "program", record.program or text.DASH
    yield "tier", text.tier_name(record.tier)
    yield "router", f"{record.router} {record.router_version}"
    yield "model", f"{record.model}, {record.dtype} on {record.device}"
    yield "outcome", str(record.outcome) if record.error is None else f"{record.outcome}: {record.error}"
    tokens = record.tokens
    yield "tokens", f"{tokens.input:,} in ({tokens.cached:,} of them cached), {tokens.output:,} out"
    flops = record.flops
    yield "FLOPs", f"{flops.total:,}, at full depth {record.identity_flops:,}"
    saved = _saved_share(record)
    yield "saved", f"{record.flops_saved:,} FLOPs, {text.share(saved, signed=True)}"
    parts = ("embed", "layers_prefill", "layers_decode", "head", "router")
    yield "of the FLOPs", ", ".join(f"{getattr(flops, part):,} {part.replace('_', ' ')}" for part in parts)
    times = {"queue": record.queue_ns, "prefill": record.prefill_ns, "decode": record.decode_ns}
    yield "times", ", ".join(f"{name} {text.milliseconds(ns)}" for name, ns in times.items())
    yield "tags", ", ".join(f"{name}={value}" for name, value in record.tags.items()) or text.DASH


def _times(zone: str) -> dict[str, Any]:
    """Functions that write moments in a zone."""

    def moment(value: datetime, other: str | None = None) -> str:
        local = value.astimezone(load_zone(other or zone))
        return f"{local:%Y-%m-%d %H:%M:%S} {local.tzname()}"

    def clock(value: datetime) -> str:
        local = value.astimezone(load_zone(zone))
        return f"{local:%H:%M:%S} {local.tzname()}"

    return {"moment": moment, "clock": clock}


def _served(today: Period, moment: datetime) -> str:
    """The time of today, or else the date as well."""
    local = moment.astimezone(load_zone(today.zone))
    same = today.local_date(moment) == today.local_date(today.since or moment)
    return f"{local:%H:%M:%S}" if same else f"{local:%Y-%m-%d %H:%M:%S}"


def _seconds(seconds: float) -> str:
    """A time that has passed, in the unit in which it is read."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:,.0f} s"


_FILTERS: Final[dict[str, Callable[..., Any]]] = {
    "line": printable,
    "clip": lambda value, most: value if len(value) <= most else f"{value[: most - 1]}…",
    "giga": lambda flops: f"{Decimal(flops) / 10**9:,.2f}",
    "seconds": _seconds,
    "per_second": lambda rate: text.DASH if rate is None else f"{rate:,.1f}",
    "part_of": lambda part, whole: text.share(Decimal(part) / whole if whole else None),
    "share_of_float": lambda share: text.share(Decimal(str(share)), signed=True),
}
