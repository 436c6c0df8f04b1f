"""Which policy a model gets: the caller's, else the user's own for it, else the shipped one, else plain bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_sdk.loading.paths import cache_folder
from polar_sdk.policy import Policy

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["find_policy", "saved_policy_path"]


def saved_policy_path(fingerprint: str) -> Path:
    """Where `polar scan --save` keeps the user's policy for a model."""
    return cache_folder() / "policies" / f"{fingerprint}.json"


def find_policy(policy: Policy | str | Path | None, fingerprint: str) -> Policy:
    """Choose the policy for a model.

    Args:
        policy: A policy, or the path of a policy file; None looks for one.
        fingerprint: The model's.

    Raises:
        PolicyError: The file that was named or found is wrong.
    """
    if isinstance(policy, Policy):
        return policy
    if policy is not None:
        return Policy.load(policy)
    saved = saved_policy_path(fingerprint)
    if saved.exists():
        return Policy.load(saved)
    return Policy.shipped(fingerprint) or Policy()
