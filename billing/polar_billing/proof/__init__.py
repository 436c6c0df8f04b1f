"""Proves a ledger and a receipt from the database alone."""
