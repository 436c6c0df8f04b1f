"""Usage and statements in formats of other systems, one module per format. Nothing here writes to the ledger."""
