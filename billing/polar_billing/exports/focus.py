"""Statements as a FOCUS 1.2 data set of cost and usage, which FinOps tools read.

    focus_rows(statements)    one row per line of a statement
    focus_csv(rows)           the same as CSV

A line of a statement has one unit price, also where prices come in bands, so each row's quantity times its unit price
is its cost. `BilledCost` is the line's amount on the statement, rounded once; `ListCost` and `ContractedCost` are not
rounded. The rounding line, prepaid money and credit notes are separate rows, so that over one invoice `BilledCost` sums
to the amount due less its credit notes. Columns that FOCUS does not have begin with `x_`. Knows no ledger.
"""

from __future__ import annotations

import json
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from polar_billing.prices.rating import ITEMS, UNIT_PRICE_SCALE, multiply, product
from polar_billing.reports.csv import write_rows
from polar_billing.statements.lines import USAGE_KINDS
from polar_billing.values.money import plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from datetime import datetime

    from polar_billing.prices.book import PriceBook
    from polar_billing.statements.period import StatementOfPeriod
    from polar_billing.statements.statement import StatementLine


COST_DECIMALS: Final = 2 * UNIT_PRICE_SCALE
"""Decimals of a quantity times a unit price."""
TIMES: Final = ("BillingPeriodEnd", "BillingPeriodStart", "ChargePeriodEnd", "ChargePeriodStart")
NUMBERS: Final = (
    "BilledCost", "ConsumedQuantity", "ContractedCost", "ContractedUnitPrice", "EffectiveCost", "ListCost",
    "ListUnitPrice", "PricingCurrencyContractedUnitPrice", "PricingCurrencyEffectiveCost",
    "PricingCurrencyListUnitPrice", "PricingQuantity",
)  # fmt: skip
COLUMNS: Final = (
    "BilledCost", "BillingAccountId", "BillingAccountName", "BillingCurrency", "BillingPeriodEnd",
    "BillingPeriodStart", "ChargeCategory", "ChargeClass", "ChargeDescription", "ChargeFrequency", "ChargePeriodEnd",
    "ChargePeriodStart", "CommitmentDiscountStatus", "ConsumedQuantity", "ConsumedUnit", "ContractedCost",
    "ContractedUnitPrice", "EffectiveCost", "InvoiceId", "InvoiceIssuerName", "ListCost", "ListUnitPrice",
    "PricingCategory", "PricingCurrency", "PricingCurrencyContractedUnitPrice", "PricingCurrencyEffectiveCost",
    "PricingCurrencyListUnitPrice", "PricingQuantity", "PricingUnit", "ProviderName", "PublisherName",
    "ServiceCategory", "ServiceName", "ServiceSubcategory", "SkuId", "SkuMeter",
    "SkuPriceDetails", "SkuPriceId",
)  # fmt: skip
"""Columns of FOCUS, by name. `CommitmentDiscountStatus` is always empty: rules about consumption look at it."""
OWN_COLUMNS: Final = (
    "x_Tier", "x_LineKind", "x_LineItem", "x_LineNumber", "x_Outcome", "x_PriceBook", "x_PriceBookHash", "x_Corrects",
    "x_Note", "x_StatementStatus",
)  # fmt: skip
_CATEGORIES: Final = {
    **dict.fromkeys((*USAGE_KINDS, "fee"), "Usage"),
    **dict.fromkeys(("discount", "service credit"), "Credit"),
    "minimum": "Adjustment",
}
"""A fee is no `Purchase`: FOCUS has those cost nothing when they are used, and a fee is used up in its period."""
_UNITS: Final = {
    "CU": "Compute Units",
    "million tokens": "1000000 Tokens",
    "request": "Requests",
    "weighted CU": "Weighted Compute Units",
    "weighted million tokens": "1000000 Weighted Tokens",
    "weighted request": "Weighted Requests",
}
"""As FOCUS writes units: plural words, with a whole number in front."""


def focus_rows(statements: Iterable[StatementOfPeriod], *, provider: str = "PoLar") -> Iterator[dict[str, Any]]:
    """One row per line of each statement, one for its rounding, and one per prepaid credit or credit note on it.

    `provider` serves and bills: `ProviderName`, `PublisherName` and `InvoiceIssuerName`.
    """
    for of_period in statements:
        statement = of_period.statement
        common = _common(of_period, provider)
        for line in statement.lines:
            yield {**common, **_line(line, of_period.book)}
        if statement.rounding:
            yield {**common, **_other("Adjustment", "Rounding of the statement", statement.rounding, "rounding")}
        for credit in statement.credits:
            if credit.used:
                what = f"Prepaid credit {credit.id}"
                yield {**common, **_other("Credit", what, credit.used.copy_negate(), "prepaid")}
        for note in of_period.credit_notes:
            yield {
                **common,
                **_other("Credit", f"Credit note {note.reference}", note.amount.copy_negate(), "credit note"),
                "ChargeClass": "Correction",
                "x_Corrects": statement.id,
                "x_Note": note.reason,
            }


def focus_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV. A text that a spreadsheet would run as a formula has an apostrophe in front."""
    written = ({**row, **{name: f"{row[name]:%Y-%m-%dT%H:%M:%SZ}" for name in TIMES}} for row in rows)
    return write_rows([*COLUMNS, *OWN_COLUMNS], written)


def _common(of_period: StatementOfPeriod, provider: str) -> dict[str, Any]:
    statement = of_period.statement
    return {
        "BillingAccountId": statement.tenant,
        "BillingAccountName": statement.tenant,
        "BillingCurrency": statement.currency,
        "PricingCurrency": statement.currency,
        **_span("BillingPeriod", statement.since, statement.until),
        **_span("ChargePeriod", statement.since, statement.until),
        "InvoiceId": statement.id,  # a draft is what FOCUS calls a provisional invoice, and keeps its id when issued
        **dict.fromkeys(("InvoiceIssuerName", "ProviderName", "PublisherName"), provider),
        "ServiceCategory": "AI and Machine Learning",
        "ServiceSubcategory": "Generative AI",
        "ServiceName": "PoLar inference",
        "x_PriceBook": statement.price_book,
        "x_PriceBookHash": statement.price_book_hash,
        "x_StatementStatus": "draft" if of_period.issued_at is None else "issued",
    }


def _span(name: str, since: datetime, until: datetime) -> dict[str, datetime]:
    return {f"{name}Start": since, f"{name}End": until}


def _line(line: StatementLine, book: PriceBook) -> dict[str, Any]:
    category = _CATEGORIES[line.kind]
    description = ", ".join([line.item, *([f"tier {line.tier}"] if line.tier else []), *filter(None, [line.note])])
    named: dict[str, Any] = {
        **_span("ChargePeriod", line.since, line.until),
        "ChargeClass": None if line.corrects is None else "Correction",
        "ChargeDescription": description,
        "x_Tier": line.tier,
        "x_LineKind": line.kind,
        "x_LineItem": line.item,
        "x_LineNumber": line.number,
        "x_Outcome": line.outcome,
        "x_Corrects": line.corrects,
        "x_Note": line.note,
    }
    if category != "Usage":
        return {**_other(category, description, line.amount, line.kind), **named}
    return {**_usage(line, book), **named}


def _other(category: str, description: str, amount: Decimal, kind: str) -> dict[str, Any]:
    """An amount without a quantity: every cost is the billed one."""
    return {
        **dict.fromkeys(("BilledCost", "ContractedCost", "EffectiveCost", "ListCost"), amount),
        "PricingCurrencyEffectiveCost": amount,
        "ChargeCategory": category,
        "ChargeDescription": description,
        "ChargeFrequency": "One-Time",
        "x_LineKind": kind,
    }


def _usage(line: StatementLine, book: PriceBook) -> dict[str, Any]:
    is_fee = line.kind == "fee"
    quantity = Decimal(1) if line.quantity is None else line.quantity
    price = line.amount if line.unit_price is None else line.unit_price
    plain_rate = None if is_fee else list_price(line, book)
    listed = price if plain_rate is None else plain_rate
    unit, meter = _UNITS.get(line.unit or "", "Packages"), _item_of(line).capitalize()
    if is_fee:
        unit, meter = "Billing Periods", "Flat fee"
    sku = "/".join(("polar", line.item if is_fee else meter, line.tier or "by hand"))
    return {
        "BilledCost": line.amount,
        "EffectiveCost": line.amount,
        "ChargeCategory": "Usage",
        "ChargeFrequency": "Recurring" if is_fee else "Usage-Based",
        "ConsumedQuantity": quantity,
        "ConsumedUnit": unit,
        "ContractedCost": _cost(quantity, price),
        "ContractedUnitPrice": price,
        "ListCost": _cost(quantity, listed),
        "ListUnitPrice": listed,
        "PricingCategory": "Standard",
        "PricingCurrencyContractedUnitPrice": price,
        "PricingCurrencyEffectiveCost": line.amount,
        "PricingCurrencyListUnitPrice": listed,
        "PricingQuantity": quantity,
        "PricingUnit": unit,
        "SkuId": sku,
        "SkuMeter": meter,
        "SkuPriceId": "/".join((sku, unit, line.item, plain(listed), book.currency)),
        "SkuPriceDetails": json.dumps({"x_Item": line.item, "x_Tier": line.tier, "x_Unit": line.unit}),
    }


def _cost(quantity: Decimal, price: Decimal) -> Decimal:
    """Their product without trailing zeros."""
    return Decimal(plain(product(quantity, price)))


def _item_of(line: StatementLine) -> str:
    """The name of what is counted, without the band or the outcome that a line is about."""
    return line.item.partition(" (")[0]


def list_price(line: StatementLine, book: PriceBook) -> Decimal | None:
    """The book's plain rate for what a line charges, for any tenant; None if there is none.

    Packages have no plain rate, and what is free costs nothing on the list either.
    """
    entry = book.entry_at(line.since)
    if entry is None or line.outcome is not None or line.unit not in _UNITS:
        return None
    # The quantity of a pool is weighted by the tiers' multipliers already.
    multiplier = Decimal(1) if line.kind == "pool" else entry.multiplier(line.tier)
    price = dict(zip((item.name for item in ITEMS.values()), entry.rates, strict=True))[_item_of(line)]
    return None if price is None or multiplier is None else multiply(price, multiplier)
