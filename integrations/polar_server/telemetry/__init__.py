"""Metrics, traces, and the state of the engine."""
