"""Schema version 11, the first: all tables, as `polar_billing.ledger.schema` defines them.

The day a table changes, today's statements take the place of `create_all` here, and the next migration makes the
change; `tests/billing/ledger/test_migrations.py` pins the definition.

Revision ID: 0011
"""

from __future__ import annotations

from alembic import op

from polar_billing.ledger.schema import metadata

revision = "0011"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    metadata.create_all(op.get_bind())
