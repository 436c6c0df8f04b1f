"""A request that has passed every check: what the engine runs, for whom, and when it must end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polar_sdk.engine.grammar import Grammar
    from polar_sdk.engine.sampling import LogitsHook, Sampling
    from polar_sdk.engine.steering import Steering
    from polar_sdk.programs.program import Program
    from polar_sdk.promises.audit import PromiseTerms
    from polar_sdk.promises.novelty import Likeness
    from polar_sdk.serving.drafts import Speculate


class Cancel(Protocol):
    """Something that can request a stop, for example a `threading.Event`."""

    def is_set(self) -> bool:
        """True from the moment the request should end."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """One request, checked and ready to run."""

    tokens: tuple[int, ...]
    """Prompt, chat template included; its length is the number of input tokens."""
    program: Program
    """The layers that it runs, prompt and answer."""
    router: str
    """Kind of the router that chose the program."""
    router_version: str
    router_flops: int
    """Executed to choose it."""
    tier: str | None
    sampling: Sampling
    stops: tuple[str, ...]
    max_tokens: int
    tenant: str
    tags: Mapping[str, str]
    request_id: str
    cancel: Cancel | None
    timeout: float | None
    """Time allowed from creation; None = unlimited. Unit: seconds."""
    steering: Steering | None = None
    """Biases and penalties on logits, before the hook; None = there are none."""
    stop_repeats: int | None = None
    """The answer ends when its last tokens are the same part N times; None = never."""
    logits_hook: LogitsHook | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    """Number of alternatives per prompt token whose log-probabilities are wanted; None = none are."""
    grammar: Grammar | None = None
    """Grammar that the answer must match; None = anything."""
    speculate: Speculate | None = None
    """Whether tokens are drafted; see `drafts_of`."""
    chooses: bool = False
    """Whether the grammar is one of given texts."""
    promises: tuple[PromiseTerms, ...] = ()
    """Promises on the answer, as far as audits can test them."""
    likeness: Likeness | None = None
    """How like the prompt is to those that its router knows; None if no router read it."""
    idle: bool = False
    """Whether it runs only while nobody else has anything to run, and gives way after each pass."""
    starts_of: str | None = None
    """Tenant whose kept starts of prompts an idle request may read, as it runs that tenant's prompt; None = none."""
    fit_max_tokens: bool = True
    """Whether an answer with a grammar is steered to an end within `max_tokens`."""
    id_is_new: bool = False
    """Whether `request_id` was made for this request, so that no other can have it."""
    tiers: Mapping[str, Program] = field(default_factory=dict)
    """Programs of the policy's tiers, among which a sink with budgets may choose a cheaper one; see `admission`."""
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    created_ns: int = field(default_factory=time.perf_counter_ns)
    """Monotonic time of creation, for queue time and timeout. Unit: nanoseconds."""

    @property
    def cancelled(self) -> bool:
        """True once the caller has requested a stop."""
        return self.cancel is not None and self.cancel.is_set()

    @property
    def late(self) -> bool:
        """True once the time allowed is up."""
        return self.timeout is not None and time.perf_counter_ns() - self.created_ns >= self.timeout * 1e9
