"""Usage and statements in the formats of others, one module per format. Nothing here writes to the ledger."""
