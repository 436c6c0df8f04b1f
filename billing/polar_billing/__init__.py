"""Metering and billing for PoLar: usage records in, charges and reports out.

`Meter` is the sink the engine hands its usage records to; `Ledger` keeps them; a `PriceBook` prices them;
`rate` applies it; `usage_rows` and `build_report` answer who used what and what it cost.

The public names are in `__init__.pyi` and load on first use, so importing this package loads neither SQLAlchemy nor
anything of the engine but its errors and the usage record. What a ledger does for parts that it does not know is put
together here: it settles holds with the records that use them, and finds what earlier processes left in the spool.
"""

from typing import TYPE_CHECKING

import lazy_loader

from polar_billing.ledger import hooks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection

    from polar_billing.ledger.ledger import Ledger
    from polar_billing.ledger.records import Entry

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def _recover(ledger: "Ledger") -> None:
    from polar_billing.metering.spool import recover_abandoned

    recover_abandoned(ledger)


def _settle(connection: "Connection", entries: "Sequence[Entry]") -> None:
    from polar_billing.budgets.settlement import settle

    settle(connection, entries)


hooks.before_usage_is_read.append(_recover)
hooks.on_stored.append(_settle)
