"""What `polar verify` checks of statements: every issued one is made again; see `rechecking`.

Importing this module adds the check to `polar_billing.proof.verify`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy import select

from polar_billing.errors import StoreDamagedError
from polar_billing.ledger.schema.statements import statement_table
from polar_billing.proof.verify import Finding, register_check
from polar_billing.statements.audit import recheck_in
from polar_billing.statements.store import read_statements
from polar_sdk.errors import PolarError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection


_NO_SENSE: Final = (ValueError, TypeError, LookupError, ArithmeticError, PolarError)
"""What stored values raise that somebody has changed into something they cannot be."""


def check_statements(connection: Connection) -> Iterator[Finding]:
    """One finding per difference between an issued statement and what follows from the ledger."""
    tenants = connection.execute(select(statement_table.c.tenant).distinct().order_by(statement_table.c.tenant))
    for tenant in tenants.scalars().all():
        try:
            for one in read_statements(connection, tenant):
                for told in recheck_in(connection, one):
                    yield Finding(tenant, None, told)
        except StoreDamagedError as error:
            yield Finding(tenant, None, str(error))
        except _NO_SENSE as error:
            yield Finding(tenant, None, f"its statements cannot be made again ({type(error).__name__}: {error}).")


register_check(check_statements)
