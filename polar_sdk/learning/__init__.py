"""Learning: train routers, certify what they promise, and evaluate them beside honest controls."""

from polar_sdk.learning.calibrate import TIER_ALPHAS, certify
from polar_sdk.learning.judge import Judge
from polar_sdk.learning.results import Evaluation
from polar_sdk.learning.settings import MenuSettings, PolicySettings
from polar_sdk.learning.train import RouterKind, Trainer

__all__ = [
    "TIER_ALPHAS",
    "Evaluation",
    "Judge",
    "MenuSettings",
    "PolicySettings",
    "RouterKind",
    "Trainer",
    "certify",
]
