"""Serving many callers through one engine: jobs, the scheduler that runs them, shared starts of prompts.

Knows requests, rows and tokens; no sinks, no records and no money.
"""

from polar_sdk.serving.job import FinishReason, Job
from polar_sdk.serving.scheduler import Limits, Scheduler

__all__ = ["FinishReason", "Job", "Limits", "Scheduler"]
