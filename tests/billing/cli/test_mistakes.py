"""A mistake on the command line is one line and an exit code, and nothing on standard output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from typer.testing import Result

from polar_billing.errors import (
    AccessError,
    AmountError,
    BudgetError,
    CurrencyMixError,
    OutputError,
    PeriodError,
    PriceBookError,
    QueryError,
    StoreNotFoundError,
)
from polar_billing.metering.meter import Meter
from polar_billing.testing import usage_record

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_billing.ledger.ledger import Ledger
    from polar_sdk.errors import PolarError

STATEMENT = "statement --tenant acme --month 2026-10"


@pytest.mark.parametrize(
    ("arguments", "kind", "named"),
    [
        ("usage --month november", PeriodError, "'november'"),
        ("usage --month 2026-11 --since 2026-11-01", QueryError, "--since"),
        ("usage --by colour", QueryError, "'colour'"),
        ("usage --tag search", QueryError, "'search'"),
        ("report --since 2026-02-01 --until 2026-01-01", PeriodError, "2026-01-01"),
        ("report --zone Mars/Olympus", PeriodError, "'Mars/Olympus'"),
        ("report --prices /no/such/prices.toml", PriceBookError, "/no/such/prices.toml"),
        ("report --ledger /no/such/folder/ledger.sqlite3", StoreNotFoundError, "/no/such/folder"),
        ("report --csv /no/such/folder/r.csv", OutputError, "/no/such/folder/r.csv"),
        ("report --mix standard=100", QueryError, "'standard'"),
        ("report --mix-from e.json", QueryError, "--mix-from"),
        ("report --tokens-per-second 40", QueryError, "--tokens-per-second"),
        ("explain nobody", QueryError, "nobody"),
        ("explain r1 --tenant globex", QueryError, "'globex'"),
        ("explain r1 --source else", QueryError, "'else'"),
        (f"explain st-{'0' * 24}/1", QueryError, f"st-{'0' * 24}"),
        ("budget set acme nothing CU", BudgetError, "'nothing'"),
        ("budget set acme 5 usd", BudgetError, "'USD'"),
        ("budget set acme 5 EUR", CurrencyMixError, "USD"),
        ("budget set acme 5 CU --over-budget warn", BudgetError, "'warn'"),
        ("budget set acme 5 CU --user ann --key k", BudgetError, "--key"),
        ("budget close acme CU", BudgetError, "'acme'"),
        ("statement --tenant nobody --month 2026-10", QueryError, "'nobody'"),
        ("statement --tenant acme --month 2999-10 --issue", PeriodError, "2999-11-01"),
        ("statement --tenant acme --since 2026-10-01", PeriodError, "2026-10-01"),
        (f"{STATEMENT} --trace 1", QueryError, "--issue"),
        ("credit-note st-0 1 --tenant acme --reason x --reference 1", QueryError, "'st-0'"),
        ("credit-note st-0 one --tenant acme --reason x --reference 1", AmountError, "'one'"),
        ("price quote --flops 1 --at yesterday", PeriodError, "'yesterday'"),
        ("reprice --book /no/such/prices.toml", PriceBookError, "/no/such/prices.toml"),
        ("key revoke nothing0", AccessError, "'nothing0'"),
        ("key rotate nothing0", AccessError, "'nothing0'"),
        ("key create acme search --expires soon", AccessError, "'soon'"),
        ("key create acme search --tag team", QueryError, "'team'"),
        ("key create acme search --scope everything", AccessError, "'everything'"),
    ],
)
def test_it_is_one_line(
    ledger: Ledger, polar: Callable[..., Result], arguments: str, kind: type[PolarError], named: str
) -> None:
    Meter(ledger).emit(usage_record("r1"))
    result = polar(*arguments.split())
    assert isinstance(result.exception, kind)
    assert result.exception.exit_code == (1 if kind in {StoreNotFoundError, OutputError} else 2)
    assert named in str(result.exception)
    assert "\n" not in str(result.exception)
    assert result.stdout == ""
