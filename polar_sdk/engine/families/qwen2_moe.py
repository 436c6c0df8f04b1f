"""The Qwen 2 MoE family: Qwen 2 whose layers may have a mixture of experts, and one that every token goes to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F  # noqa: N812

from polar_sdk.engine.families.qwen2 import Qwen2Family
from polar_sdk.engine.parts import choose_experts, gated_mlp, run_experts, take_experts

if TYPE_CHECKING:
    from torch import Tensor

    from polar_sdk.engine.types import Weights


class Qwen2MoeFamily(Qwen2Family):
    """`Qwen2MoeForCausalLM`: layers of type `sliding_attention` see the last `sliding_window` keys, own included."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_moe",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.experts: int = config.num_experts
        self.experts_per_token: int = config.num_experts_per_tok
        self.expert_width: int = config.moe_intermediate_size
        self.shared_width: int = config.shared_expert_intermediate_size
        self.normalise: bool = config.norm_topk_prob
        self.mixed = tuple(
            index not in config.mlp_only_layers and self.experts > 0 and (index + 1) % config.decoder_sparse_step == 0
            for index in range(self.depth)
        )
        """Whether a layer has experts, one entry per layer."""

    @property
    def plan(self) -> None:
        """None: which experts a token goes to is decided in the middle of a layer."""
        return None

    def take_mlp(self, block: Any) -> Weights:
        """Llama's; in a layer with experts, `gate_up` and `down` are those of the shared one."""
        if not hasattr(block, "experts"):
            return super().take_mlp(block)
        gate = block.shared_expert_gate.weight.detach()
        return {**super().take_mlp(block.shared_expert), "shared_gate": gate, **take_experts(block)}

    def mlp(self, x: Tensor, w: Weights) -> Tensor:
        """The chosen experts and the shared one, weighted by a gate; or the feed-forward of a plain layer."""
        shared = gated_mlp(x, w["gate_up"], w["down"], self.act)
        if "router" not in w:
            return shared
        scores, chosen = choose_experts(x, w["router"], self.experts_per_token, normalise=self.normalise)
        mixed = run_experts(x, scores.to(x.dtype), chosen, w, self.act)
        return mixed + F.linear(x, w["shared_gate"]).sigmoid() * shared

    def mlp_linear(self, index: int) -> int:
        """Router, gate, the shared expert, and the others that one token goes to."""
        if not self.mixed[index]:
            return super().mlp_linear(index)
        width = self.experts_per_token * self.expert_width + self.shared_width
        return self.hidden * (self.experts + 1 + 3 * width)
