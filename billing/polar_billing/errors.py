"""Every error that metering and billing raise on purpose, as one tree.

BillingError (PolarError)
├── StoreError (SinkError)                 the ledger's store cannot do it now; exit code 1
│   ├── StoreNotFoundError                 no such folder, file or database
│   ├── StoreReadOnlyError                 the store may be read but not written
│   ├── RecordRefusedError                 content that the database cannot hold
│   ├── StoreFullError                     no room for another record
│   ├── StoreLockedError                   another process holds the store; retryable
│   ├── StoreDamagedError                  not a database, or a damaged one
│   ├── StoreUnavailableError              the database server does not answer; retryable
│   └── SchemaVersionError                 written by another version of polar-llm
├── ConflictError (SinkError, ValueError)  a request id used again with other content
├── LedgerUnsoundError                     a ledger or a receipt that was changed after it was written
├── UpstreamAuditError                     work of a vLLM that the ledger does not account for
├── LedgerUrlError (ValueError)            a ledger URL that names no supported store
├── AmountError (ValueError)               not finite, too fine or too large to be kept exactly
├── UnbalancedError (ValueError)           the lines of a transaction that do not sum to zero
├── PriceBookError (ValueError)            a price book that is missing or malformed
├── BudgetError (ValueError)               a malformed or unknown budget
├── AccessError (ValueError)               an API key that is unknown, or has impossible limits
├── PeriodError (ValueError)               a month, date or time zone that does not parse
├── QueryError (ValueError)                a question about usage that cannot be answered
│   ├── CurrencyMixError                   amounts of several currencies in one sum
│   └── UnknownTenantError                 a tenant with neither usage nor a plan
├── OutputError (OSError)                  a report cannot be written to its destination
└── MissingExtraError (ImportError)        an optional dependency is not installed

A request for which a budget has no room raises `polar_sdk.errors.BudgetExceededError`, which callers can catch without
this package. The store errors and the conflict are sink errors too, so the engine fails closed on them without knowing
this package. This module knows no SQL: `ledger.location` decides which database failure is which of these.
"""

from __future__ import annotations

from polar_sdk.errors import PolarError, SinkError


class BillingError(PolarError):
    """Base of every error of metering and billing."""


class StoreError(BillingError, SinkError):
    """The ledger's store cannot be read or written now; nothing was stored in part."""


class StoreNotFoundError(StoreError):
    """The folder, file or database of the ledger does not exist."""


class StoreReadOnlyError(StoreError):
    """The ledger may be read but not written."""


class RecordRefusedError(StoreError):
    """The database cannot hold the content of a record; others are not affected."""


class StoreFullError(StoreError):
    """The disk, or the database's own limit, has no room for another record."""


class StoreLockedError(StoreError):
    """Another process held the ledger for longer than the busy timeout."""

    retryable = True


class StoreDamagedError(StoreError):
    """The file is not a database, or parts of it cannot be read."""


class StoreUnavailableError(StoreError):
    """The database server does not answer, or refuses the login."""

    retryable = True


class SchemaVersionError(StoreError):
    """The ledger's tables were created by another version of polar-llm."""


class ConflictError(BillingError, SinkError, ValueError):
    """A request id that the ledger already holds, with other content; the first record stands."""

    exit_code = 2


def id_in_use(tenant: str, request_id: str, how: str) -> ConflictError:
    """The error of a request whose id another one has, raised before it computes anything."""
    return ConflictError(f"request {request_id!r} of tenant {tenant!r} {how}.", hint="Give every request its own id.")


class LedgerUnsoundError(BillingError):
    """A ledger that was changed by other means than this package, or a receipt that does not agree with it."""


class UpstreamAuditError(BillingError):
    """What a vLLM executed and what the ledger billed for it do not agree, or requests still run there."""


class LedgerUrlError(BillingError, ValueError):
    """A ledger URL that names no supported store."""

    exit_code = 2


class AmountError(BillingError, ValueError):
    """An amount that cannot be kept exactly: not finite, too fine or too large."""

    exit_code = 2


class UnbalancedError(BillingError, ValueError):
    """A transaction whose lines do not sum to zero; nothing was booked."""

    exit_code = 2


class PriceBookError(BillingError, ValueError):
    """A price book that is missing, malformed or contradicts itself."""

    exit_code = 2


class BudgetError(BillingError, ValueError):
    """A budget that is malformed or unknown."""

    exit_code = 2


class AccessError(BillingError, ValueError):
    """An API key that is unknown or not active, or a bound of one that is not valid."""

    exit_code = 2


class PeriodError(BillingError, ValueError):
    """A month, date or time zone that does not parse, or a period that is empty."""

    exit_code = 2


class QueryError(BillingError, ValueError):
    """A question about usage that cannot be answered as it was put."""

    exit_code = 2


class CurrencyMixError(QueryError):
    """Amounts of several currencies would have to be added."""


class UnknownTenantError(QueryError):
    """The ledger has no usage of a tenant, and no price book in force has it on a plan."""


class OutputError(BillingError, OSError):
    """A report cannot be written to its destination."""

    @classmethod
    def of(cls, path: object, error: OSError) -> OutputError:
        """The error of a file that the system does not let us write."""
        return cls(
            f"{str(path)!r} cannot be written ({error.strerror or error}).", hint="Check that its folder exists."
        )


class MissingExtraError(BillingError, ImportError):
    """An optional dependency of polar-llm is not installed."""

    exit_code = 2

    @classmethod
    def of(cls, what: str, missing: ImportError, extra: str) -> MissingExtraError:
        """The error of what needs a module that an extra installs."""
        hint = f"Install the extra {extra} of polar-llm, in a clone: `pip install '.[{extra}]'`."
        return cls(f"{what} needs {missing.name!r}.", hint=hint)
