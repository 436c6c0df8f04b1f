"""The Mixtral family: Mistral with a mixture of experts instead of the feed-forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from polar_sdk.engine.families.mistral import MistralFamily
from polar_sdk.engine.parts import choose_experts, run_experts, take_experts

if TYPE_CHECKING:
    from torch import Tensor

    from polar_sdk.engine.types import Weights


class MixtralFamily(MistralFamily):
    """`MixtralForCausalLM`: a query sees the last `sliding_window` keys, its own included; None = all."""

    model_types: ClassVar[tuple[str, ...]] = ("mixtral",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.experts: int = config.num_local_experts
        self.experts_per_token: int = config.num_experts_per_tok

    @property
    def plan(self) -> None:
        """None: which experts a token goes to is decided in the middle of a layer."""
        return None

    def take_mlp(self, block: Any) -> Weights:
        """A router, and two matrices per expert."""
        return take_experts(block)

    def mlp(self, x: Tensor, w: Weights) -> Tensor:
        """The chosen experts, by scores that sum to 1 and stay in float32."""
        scores, chosen = choose_experts(x, w["router"], self.experts_per_token, normalise=True)
        return run_experts(x, scores, chosen, w, self.act)

    def mlp_linear(self, index: int) -> int:
        """The router, and the experts that one token goes to."""
        return self.hidden * (self.experts + 3 * self.experts_per_token * self.intermediate)
