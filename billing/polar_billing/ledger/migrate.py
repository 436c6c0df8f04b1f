"""Bring a ledger of an earlier schema version to this one's, in one transaction, by the Alembic migrations.

The version of a ledger is in `polar_schema`; Alembic's own table follows it. Knows no other table of the ledger.
"""

from __future__ import annotations

from datetime import UTC, datetime
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import insert

from polar_billing.errors import MissingExtraError, SchemaVersionError
from polar_billing.ledger.location import is_absent
from polar_billing.ledger.schema import FIRST_VERSION, SCHEMA_VERSION, version_table

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from polar_billing.ledger.ledger import Ledger


MIGRATIONS: Final = str(resources.files("polar_billing.ledger") / "migrations")
"""Folder of Alembic's scripts, one per version, by its number in four digits."""


def migrate(ledger: Ledger) -> tuple[int, int]:
    """Bring a ledger to this polar-llm's schema version.

    Args:
        ledger: One that exists.

    Returns:
        The version before and the version after.

    Raises:
        SchemaVersionError: There is no ledger, or its version has no way to this one.
        StoreError: The ledger cannot be written; it is as it was.
    """
    nothing = SchemaVersionError(f"ledger {ledger.location!r} holds nothing to migrate.", hint="Name another ledger.")
    if is_absent(ledger.url):
        raise nothing  # opening it would create it
    with ledger.unprepared() as connection:
        before = ledger.stored_version(connection)
        if before is None:
            raise nothing
        if not FIRST_VERSION <= before <= SCHEMA_VERSION:
            raise ledger.wrong_version(before)
        if before != SCHEMA_VERSION:
            upgrade(connection, f"{before:04d}", MIGRATIONS)
            connection.execute(insert(version_table).values(version=SCHEMA_VERSION, applied_at=datetime.now(UTC)))
    ledger.close()
    return before, SCHEMA_VERSION


def upgrade(connection: Connection, revision: str, migrations: str) -> None:
    """Run all of Alembic's scripts in a folder after a revision (`base` for nothing), all of them or none.

    Raises:
        MissingExtraError: Alembic is not installed.
    """
    try:
        from alembic import command
        from alembic.config import Config
    except ModuleNotFoundError as error:
        raise MissingExtraError.of("a migration", error, "billing") from error
    config = Config()
    config.set_main_option("script_location", migrations)
    config.set_main_option("path_separator", "os")
    attributes: dict[str, Any] = config.attributes
    attributes["connection"] = connection
    command.stamp(config, revision, purge=True)
    command.upgrade(config, "head")
