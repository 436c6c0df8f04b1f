"""Serving many callers through one engine: jobs, the scheduler that runs them, and shared prompt prefixes.

Knows requests, rows and tokens; no sinks, no usage records and no money.
"""
