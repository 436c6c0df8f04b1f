"""Bring a ledger from one schema version to another, up or down, in one transaction, by the Alembic migrations.

Which version a ledger has is what `polar_schema` says; Alembic's own table follows it. Knows no table of the ledger
but that one.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any

from polar_billing.errors import MissingExtraError, SchemaVersionError
from polar_billing.ledger.location import is_absent
from polar_billing.ledger.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from polar_billing.ledger.ledger import Ledger


def migrate(ledger: Ledger, to: int = SCHEMA_VERSION) -> tuple[int, int]:
    """Bring a ledger to a schema version.

    Args:
        ledger: One that exists.
        to: The version, 1 to this polar-llm's own.

    Returns:
        The version before and the version after.

    Raises:
        SchemaVersionError: A version that this polar-llm does not know, or that has no place for what is stored.
        StoreError: The ledger cannot be written; it is as it was.
    """
    if not 1 <= to <= SCHEMA_VERSION:
        raise SchemaVersionError(
            f"schema version {to} is unknown; this polar-llm knows versions 1 to {SCHEMA_VERSION}.",
            hint="Use another version of polar-llm.",
        )
    nothing = SchemaVersionError(f"ledger {ledger.location!r} holds nothing to migrate.", hint="Name another ledger.")
    if is_absent(ledger.url):
        raise nothing  # opening it would create it
    with ledger.unprepared() as connection:
        before = ledger.stored_version(connection)
        if before is None:
            raise nothing
        if before > SCHEMA_VERSION:
            raise SchemaVersionError(
                f"ledger {ledger.location!r} has schema version {before}, newer than the "
                f"{SCHEMA_VERSION} of this polar-llm.",
                hint="Use the polar-llm version that created it.",
            )
        if before != to:
            _run(connection, before, to)
    ledger.close()
    return before, to


def _run(connection: Connection, before: int, to: int) -> None:
    try:
        from alembic import command
        from alembic.config import Config
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"migrations need {error.name!r}.",
            hint="Install the extra billing of polar-llm, in a clone: `pip install '.[billing]'`.",
        ) from error
    config = Config()
    config.set_main_option("script_location", str(resources.files("polar_billing.ledger") / "migrations"))
    config.set_main_option("path_separator", "os")
    attributes: dict[str, Any] = config.attributes
    attributes["connection"] = connection
    command.stamp(config, f"{before:04d}", purge=True)
    (command.upgrade if to > before else command.downgrade)(config, f"{to:04d}")
