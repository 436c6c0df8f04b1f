"""Serving many callers through one engine: jobs, the scheduler that runs them, shared starts of prompts.

Knows requests, rows and tokens; no sinks, no records and no money.
"""
