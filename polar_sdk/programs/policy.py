"""The policy: limits of programs and loops, the programs of one model's tiers, and floors.

A policy is a JSON or TOML file; the one for the default model ships in `polar_sdk/shipped/policies/`. It chooses
nothing itself; the router does. Knows programs and costs, not weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from polar_sdk.errors import (
    CostCeilingError,
    PolicyError,
    ProtectedLayerError,
    UnknownTierError,
    VisitLimitError,
    nearest,
)
from polar_sdk.programs.floors import TIERS, Floor
from polar_sdk.programs.program import Program
from polar_sdk.reading import parse_json, read_document

if TYPE_CHECKING:
    from torch import Tensor

    from polar_sdk.programs.cost import CostModel


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class LoopGuard:
    """Bounds on what an extra visit does to the hidden state.

    A layer was trained to be visited once. Fed its own output, it may enlarge or turn the state too much. The guard
    checks each extra visit at the row's last token, and on a breach restores the state before it. The loop then stays
    off for the rest of the request, so that no later step misses the keys of a visit that was left out.

    Attributes:
        max_step: Maximum length of the change, as a multiple of the length of the state before it.
        min_cosine: Minimum cosine between the states before and after.
    """

    max_step: float = 1.0
    min_cosine: float = 0.5

    def breached(self, before: Tensor, after: Tensor) -> Tensor:
        """Whether each row breaches, (B,) of booleans, for states (B, E) before and after an extra visit."""
        import torch.nn.functional as F  # noqa: N812  (a policy is read where torch is not needed)

        old, new = before.float(), after.float()
        step = (new - old).norm(dim=-1) / old.norm(dim=-1).clamp(min=1e-12)
        cosine = F.cosine_similarity(old, new, dim=-1)
        # Written so that NaN breaches.
        kept: Tensor = (step <= self.max_step) & (cosine >= self.min_cosine)
        return ~kept


class Tier(_Frozen):
    """One named offer of a policy, as far as the engine is concerned."""

    program: Program
    """The program of every prompt of this tier, until a learned router chooses per prompt."""
    note: str = ""
    """A measurement of this program, in a sentence; it is not a promise."""


class Policy(_Frozen):
    """Limits of the router, and the programs of the tiers."""

    model: str | None = None
    """Name of the model it was made for; None = any."""
    fingerprint: str | None = None
    """Fingerprint of that model; None = any."""
    protected: tuple[int, ...] = (0, 1, -1)
    """Layers that every program visits; negative numbers count from the last layer."""
    max_visits: int = Field(default=3, ge=1)
    """Maximum number of visits of one layer by one program."""
    cost_ceiling: float = Field(default=1.15, gt=0)
    """Maximum FLOPs of a program, as a multiple of identity's."""
    loop_guard: LoopGuard | None = LoopGuard()
    """Bounds on what an extra visit of a loop does to the hidden state before the loop is stopped; None = anything."""
    margin: float = Field(default=0.0, ge=0, lt=1)
    """Largest share by which the dial of a learned router is set lower for a prompt, at random and by a key that every
    process makes for itself: who has the router's weights cannot search for prompts that just pass. 0 = not at all."""
    default_tier: str | None = None
    """Tier of a request that names none; None = identity."""
    tiers: dict[str, Tier] = Field(default_factory=dict)
    floors: tuple[Floor, ...] = ()
    """Requests that no tier below a certain one may serve, whatever their callers ask for."""

    @field_validator("tiers")
    @classmethod
    def _known_tiers(cls, tiers: dict[str, Tier]) -> dict[str, Tier]:
        if unknown := sorted(set(tiers) - set(TIERS)):
            raise ValueError(f"tier {unknown[0]!r} is not one of {', '.join(TIERS)}")
        return tiers

    @model_validator(mode="after")
    def _default_exists(self) -> Self:
        if self.default_tier is not None and self.default_tier not in self.tiers:
            raise ValueError(f"default_tier {self.default_tier!r} is not among the tiers {sorted(self.tiers)}")
        return self

    @classmethod
    def permissive(cls) -> Self:
        """No bounds beyond the model's own depth: for research and parity tests."""
        return cls(protected=(), max_visits=4096, cost_ceiling=float("inf"), loop_guard=None)

    @classmethod
    def of(cls, policy: Policy | str | Path) -> Policy:
        """A policy, or the one in a file.

        Raises:
            PolicyError: As `load`.
        """
        return policy if isinstance(policy, Policy) else cls.load(policy)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a policy file.

        Raises:
            PolicyError: The file is missing, is not valid JSON, or contains a wrong value.
        """
        hint = "Leave it out: `polar fit` makes a router for any model, and full depth needs none."
        return read_document(path, cls, lambda reason: PolicyError(f"policy file {str(path)!r} {reason}.", hint=hint))

    @property
    def only_adds(self) -> bool:
        """Whether it leaves the tiers to the policy and the router that the model has, and adds floors or a margin."""
        return not self.tiers and bool(self.floors or self.margin)

    def over(self, other: Policy) -> Policy:
        """Another policy with everything that this one states put in its place."""
        return other.model_copy(update={name: getattr(self, name) for name in self.model_fields_set})

    @classmethod
    def shipped(cls, fingerprint: str) -> Self | None:
        """The policy that ships with this package for a model, or None."""
        folder = resources.files("polar_sdk") / "shipped" / "policies"
        for file in folder.iterdir():
            if file.name.endswith(".json"):
                policy = cls.model_validate(parse_json(file.read_bytes()))
                if policy.fingerprint == fingerprint:
                    return policy
        return None

    def save(self, path: str | Path) -> None:
        """Write the policy file; its folder is created if needed."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        data: dict[str, Any] = self.model_dump(mode="json")
        target.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    def bind(self, fingerprint: str, cost: CostModel) -> None:
        """Check that the policy belongs to this model and that all its tiers can run on it.

        Raises:
            PolicyError: It was made for another model, or does not fit this one.
            ProgramError: A tier's program breaks the policy's own bounds.
        """
        if self.fingerprint is not None and self.fingerprint != fingerprint:
            raise PolicyError(
                f"the policy was made for model {self.model or 'unnamed'} ({self.fingerprint[:12]}…), "
                f"but this model is {fingerprint[:12]}…; leave it out, or make a router with `polar fit`."
            )
        for layer in self.protected:
            if not -cost.depth <= layer < cost.depth:
                raise PolicyError(
                    f"the policy protects layer {layer}, which does not exist; the model has {cost.depth} layers, "
                    f"numbered 0 to {cost.depth - 1}, or -{cost.depth} to -1 from the end."
                )
        for tier in self.tiers.values():
            self.check(tier.program, cost)
        if "exact" in self.tiers and not self.tiers["exact"].program.is_identity(cost.depth):
            raise PolicyError(
                f"tier 'exact' has program {self.tiers['exact'].program.text!r}, but it means full depth, "
                f"0-{cost.depth - 1}; give the program to another tier."
            )

    def program_for(self, tier: str | None, depth: int) -> tuple[str | None, Program]:
        """The tier in force and its program; identity where neither request nor policy names a tier.

        Raises:
            UnknownTierError: The policy has no such tier.
        """
        name = tier if tier is not None else self.default_tier
        if name is not None and not isinstance(name, str):
            raise UnknownTierError(f"tier must be a string (got {name!r}); use one of {', '.join(TIERS)}.")
        if name is None:
            return None, Program.identity(depth)
        if name in self.tiers:
            return name, self.tiers[name].program
        if name == "exact":  # full depth needs no policy file
            return name, Program.identity(depth)
        raise UnknownTierError(self._unknown_tier(name))

    def _unknown_tier(self, name: str) -> str:
        known = sorted({*self.tiers, "exact"}, key=TIERS.index)
        if name in TIERS:
            return (
                f"tier {name!r} has no program for this model; its policy offers {', '.join(known)}. "
                "Make a router for it with `polar fit`."
            )
        near = nearest(name, known)
        suggestion = f" Did you mean {near!r}?" if near else ""
        return f"tier {name!r} is unknown; use one of {', '.join(known)}.{suggestion}"

    def free(self, depth: int) -> list[int]:
        """The layers of a model that programs may leave out."""
        protected = {layer % depth for layer in self.protected}
        return [layer for layer in range(depth) if layer not in protected]

    def check(self, program: Program, cost: CostModel) -> None:
        """Raise the ProgramError that says why a program may not run.

        Raises:
            ProgramDepthError: A step goes beyond the last layer of the model.
            ProtectedLayerError: A protected layer is skipped.
            VisitLimitError: One layer is visited too often.
            CostCeilingError: The program is too expensive at 128 prompt and 64 output tokens.
        """
        program.check_depth(cost.depth)
        skipped = set(program.skips(cost.depth)) - set(self.free(cost.depth))
        if skipped:
            raise ProtectedLayerError(
                f"program {program.text!r} skips layer {min(skipped)}, which the policy protects "
                f"(protected: {', '.join(map(str, self.protected))}).",
                hint="Keep it, or load the model with a policy whose `protected` leaves it out.",
            )
        if program.most_visits > self.max_visits:
            raise VisitLimitError(
                f"program {program.text!r} visits one layer {program.most_visits} times; "
                f"at most {self.max_visits} are allowed.",
                hint="Loop less, or raise `max_visits` in the policy.",
            )
        if (ratio := cost.ratio(program)) > self.cost_ceiling:
            raise CostCeilingError(
                f"program {program.text!r} costs {ratio:.4g} × identity; at most {self.cost_ceiling:g} × is allowed.",
                hint="Skip more, or raise `cost_ceiling` in the policy.",
            )
