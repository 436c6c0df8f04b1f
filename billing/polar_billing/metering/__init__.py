"""From a usage record to the ledger: the meter, its thread, and the spool."""
