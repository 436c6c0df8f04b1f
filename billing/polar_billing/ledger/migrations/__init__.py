"""Alembic migrations of the ledger's schema, from the first released version on."""
