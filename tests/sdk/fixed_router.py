"""A menu router whose choice is known: it predicts the same for every prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from polar_sdk.router.learned import RouterFacts
from polar_sdk.router.menu import MenuRouter
from polar_sdk.router.network import FeatureReader, Network

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_sdk.model import PolarModel
    from polar_sdk.programs.program import Program


def fixed_router(model: PolarModel, menu: Sequence[Program], quality: Sequence[float], **facts: Any) -> MenuRouter:
    """A bound router.

    Args:
        model: That it is for.
        menu: Programs, identity first.
        quality: What it predicts for each of the others.
        **facts: Further facts of the router.
    """
    features = FeatureReader(model.decoder).stack([[1, 2, 3], [40, 50, 60], [7] * 9])
    network = Network.fresh(features, (), len(menu) - 1, seed=0)
    network.biases[-1].copy_(torch.logit(torch.tensor(quality)))
    known = RouterFacts(model="tiny", fingerprint=model.fingerprint, depth=model.depth, **facts)
    return MenuRouter(known, network, menu).bind(model.decoder, model.fingerprint)
