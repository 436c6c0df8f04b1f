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
    from polar_billing.budgets.budget import Budget, Level, OverBudget
    from polar_billing.budgets.keeper import Budgets
    from polar_billing.errors import (
        AmountError,
        BillingError,
        BudgetError,
        ConflictError,
        CurrencyMixError,
        LedgerUnsoundError,
        LedgerUrlError,
        MissingExtraError,
        OutputError,
        PeriodError,
        PriceBookError,
        QueryError,
        RecordRefusedError,
        SchemaVersionError,
        StoreDamagedError,
        StoreError,
        StoreFullError,
        StoreLockedError,
        StoreNotFoundError,
        StoreReadOnlyError,
        StoreUnavailableError,
        UnbalancedError,
    )
    from polar_billing.ledger import Ledger
    from polar_billing.meter import Meter, open_meter
    from polar_billing.periods import ALL_TIME, Period, Window
    from polar_billing.postings import Account, Line, balances, post
    from polar_billing.price_book import PriceBook
    from polar_billing.pricing.bound import Quote, quote
    from polar_billing.query import UsageRow, usage_rows
    from polar_billing.rating import Rating, rate
    from polar_billing.render_csv import report_csv, usage_csv
    from polar_billing.render_html import report_html
    from polar_billing.report import Report, build_report
    from polar_billing.statements import (
        Agreement,
        CreditNote,
        IssuedStatement,
        Repriced,
        Statement,
        StatementLine,
        add_book,
        credit_note,
        credit_notes,
        draft_statement,
        issue_statement,
        issued_statements,
        lines_of_usage,
        recheck,
        reprice,
        usage_of_line,
    )
    from polar_billing.storage import ALL_TENANTS, LedgerStorage, Selection, StoredUsage
    from polar_billing.verify import Verification, verify_ledger

_HOMES: Final = {
    "budgets.budget": "Budget Level OverBudget",
    "budgets.keeper": "Budgets",
    "errors": (
        "AmountError BillingError BudgetError ConflictError CurrencyMixError LedgerUnsoundError "
        "LedgerUrlError MissingExtraError OutputError PeriodError PriceBookError QueryError "
        "RecordRefusedError SchemaVersionError StoreDamagedError StoreError StoreFullError StoreLockedError "
        "StoreNotFoundError StoreReadOnlyError StoreUnavailableError UnbalancedError"
    ),
    "ledger": "Ledger",
    "meter": "Meter open_meter",
    "periods": "ALL_TIME Period Window",
    "postings": "Account Line balances post",
    "price_book": "PriceBook",
    "pricing.bound": "Quote quote",
    "query": "UsageRow usage_rows",
    "rating": "Rating rate",
    "render_csv": "report_csv usage_csv",
    "render_html": "report_html",
    "report": "Report build_report",
    "verify": "Verification verify_ledger",
    "statements": (
        "Agreement CreditNote IssuedStatement Repriced Statement StatementLine add_book credit_note credit_notes "
        "draft_statement issue_statement issued_statements lines_of_usage recheck reprice usage_of_line"
    ),
    "storage": "ALL_TENANTS LedgerStorage Selection StoredUsage",
}
_HOME_OF: Final = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "ALL_TENANTS",
    "ALL_TIME",
    "Account",
    "Agreement",
    "AmountError",
    "BillingError",
    "Budget",
    "BudgetError",
    "Budgets",
    "ConflictError",
    "CreditNote",
    "CurrencyMixError",
    "IssuedStatement",
    "Ledger",
    "LedgerStorage",
    "LedgerUnsoundError",
    "LedgerUrlError",
    "Level",
    "Line",
    "Meter",
    "MissingExtraError",
    "OutputError",
    "OverBudget",
    "Period",
    "PeriodError",
    "PriceBook",
    "PriceBookError",
    "QueryError",
    "Quote",
    "Rating",
    "RecordRefusedError",
    "Report",
    "Repriced",
    "SchemaVersionError",
    "Selection",
    "Statement",
    "StatementLine",
    "StoreDamagedError",
    "StoreError",
    "StoreFullError",
    "StoreLockedError",
    "StoreNotFoundError",
    "StoreReadOnlyError",
    "StoreUnavailableError",
    "StoredUsage",
    "UnbalancedError",
    "UsageRow",
    "Verification",
    "Window",
    "add_book",
    "balances",
    "build_report",
    "credit_note",
    "credit_notes",
    "draft_statement",
    "issue_statement",
    "issued_statements",
    "lines_of_usage",
    "open_meter",
    "post",
    "quote",
    "rate",
    "recheck",
    "report_csv",
    "report_html",
    "reprice",
    "usage_csv",
    "usage_of_line",
    "usage_rows",
    "verify_ledger",
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
