"""The ledger: append-only, double-entry, hash-chained, on SQLite or PostgreSQL."""
