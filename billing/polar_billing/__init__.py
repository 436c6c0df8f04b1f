"""Metering and billing for PoLar: usage records in, charges and reports out.

`Meter` is the sink the engine hands its usage records to; `Ledger` keeps them; a `PriceBook` prices them;
`rate` applies it; `usage_rows` and `build_report` answer who used what and what it cost.

The names below are loaded when first used, so importing this package loads neither SQLAlchemy nor anything of
the engine but its errors and the usage record.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from polar_billing.errors import (
        AmountError,
        BillingError,
        ConflictError,
        CurrencyMixError,
        LedgerUrlError,
        MissingExtraError,
        OutputError,
        PeriodError,
        PriceBookError,
        QueryError,
        SchemaVersionError,
        StoreDamagedError,
        StoreError,
        StoreFullError,
        StoreLockedError,
        StoreNotFoundError,
        StoreReadOnlyError,
        StoreUnavailableError,
    )
    from polar_billing.ledger import Ledger
    from polar_billing.meter import Meter, open_meter
    from polar_billing.periods import ALL_TIME, Period
    from polar_billing.price_book import PriceBook
    from polar_billing.query import UsageRow, usage_rows
    from polar_billing.rating import Rating, rate
    from polar_billing.render_csv import report_csv, usage_csv
    from polar_billing.render_html import report_html
    from polar_billing.report import Report, build_report
    from polar_billing.storage import ALL_TENANTS, LedgerStorage, Selection, StoredUsage

_HOMES: Final = {
    "errors": (
        "AmountError BillingError ConflictError CurrencyMixError LedgerUrlError MissingExtraError "
        "OutputError PeriodError PriceBookError QueryError SchemaVersionError StoreDamagedError StoreError "
        "StoreFullError StoreLockedError StoreNotFoundError StoreReadOnlyError StoreUnavailableError"
    ),
    "ledger": "Ledger",
    "meter": "Meter open_meter",
    "periods": "ALL_TIME Period",
    "price_book": "PriceBook",
    "query": "UsageRow usage_rows",
    "rating": "Rating rate",
    "render_csv": "report_csv usage_csv",
    "render_html": "report_html",
    "report": "Report build_report",
    "storage": "ALL_TENANTS LedgerStorage Selection StoredUsage",
}
_HOME_OF: Final = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "ALL_TENANTS",
    "ALL_TIME",
    "AmountError",
    "BillingError",
    "ConflictError",
    "CurrencyMixError",
    "Ledger",
    "LedgerStorage",
    "LedgerUrlError",
    "Meter",
    "MissingExtraError",
    "OutputError",
    "Period",
    "PeriodError",
    "PriceBook",
    "PriceBookError",
    "QueryError",
    "Rating",
    "Report",
    "SchemaVersionError",
    "Selection",
    "StoreDamagedError",
    "StoreError",
    "StoreFullError",
    "StoreLockedError",
    "StoreNotFoundError",
    "StoreReadOnlyError",
    "StoreUnavailableError",
    "StoredUsage",
    "UsageRow",
    "build_report",
    "open_meter",
    "rate",
    "report_csv",
    "report_html",
    "usage_csv",
    "usage_rows",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
