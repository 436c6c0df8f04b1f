"""Promises in service: the monitor of audited losses, and what is unusual about prompts.

Standard library and pydantic only, since the ledger recomputes what is decided here. Knows no model and no money.
"""
