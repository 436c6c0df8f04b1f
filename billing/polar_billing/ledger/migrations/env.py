"""Alembic's environment: runs the migrations on the connection that `polar_billing.ledger.migrate` passes."""

from __future__ import annotations

from alembic import context

from polar_billing.ledger.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table="polar_alembic",
    transactional_ddl=True,  # both databases can; a migration happens as a whole or not at all
)
with context.begin_transaction():
    context.run_migrations()
