"""Rewards: what a program does on a prompt, beside what identity does. Measured once and kept."""

from polar_sdk.rewards.cache import RewardCache, cache_path
from polar_sdk.rewards.measure import SAME_ANSWER, Measurer, Reward, rewards_of
from polar_sdk.rewards.tasks import Task, make_tasks

__all__ = ["SAME_ANSWER", "Measurer", "Reward", "RewardCache", "Task", "cache_path", "make_tasks", "rewards_of"]
