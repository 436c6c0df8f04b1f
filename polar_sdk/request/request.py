"""From what a caller asks to what the engine runs: prompt to tokens, tier to program, and every check before compute.

Knows a tokenizer, a policy and a cost model; runs nothing. A request that gets past here can be served.
"""

from __future__ import annotations

import math
import operator
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar

from polar_sdk.engine.sampling import MOST_ALTERNATIVES, Sampling
from polar_sdk.errors import (
    ContextWindowError,
    EmptyPromptError,
    InvalidRequestError,
    SamplingError,
    TagError,
    ToleranceError,
    did_you_mean,
)
from polar_sdk.programs.program import Program
from polar_sdk.router.fixed import fixed_router
from polar_sdk.router.learned import LearnedRouter
from polar_sdk.usage import new_request_id

if TYPE_CHECKING:
    from polar_sdk.engine.sampling import LogitsHook
    from polar_sdk.programs.cost import CostModel
    from polar_sdk.programs.policy import Policy
    from polar_sdk.request.prompts import PromptEncoder, Template
    from polar_sdk.router.base import Route, Router


Message = Mapping[str, str]
"""One chat message: `role` (system, user, assistant) and `content`."""
Prompt = str | Sequence[Message]
T = TypeVar("T")
_DEFAULT_MAX_TOKENS = 256
_LONGEST_NAME = 200
_OF_THE_BATCH = frozenset({"cancel", "timeout"})
"""Options that end a batch as a whole."""


class Cancel(Protocol):
    """Something that can say "stop", for example a `threading.Event`."""

    def is_set(self) -> bool:
        """True from the moment the request should end."""
        ...


class RequestOptions(TypedDict, total=False):
    """Keyword options of `PolarModel.generate` and its kin."""

    template: Template
    """`auto`: a plain text becomes one user message if the model has a chat template; `chat`: it must have one;
    `raw`: the text as it is, special tokens in it understood, none added."""
    compute: str | float | None
    """Tier: economy, standard, premium or exact; or a tolerance that a certified router promises, such as 0.05: the
    largest share of answers that may differ from identity's. None = the default tier."""
    program: Program | str | None
    """A program by hand; wins over `compute` and over the router."""
    max_tokens: int | None
    """Most tokens of the answer; None = 256, or what the context window leaves."""
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: str | Sequence[str] | None
    """Texts that end the answer; they are not part of it."""
    logits_hook: LogitsHook | None
    """Called before each token is chosen, greedily or not: (ids sampled so far, float32 logits (V,)) → logits (V,).
    It holds up all rows and must not call the model; an error in it ends this request only."""
    logprobs: int | None
    """Report the log-probability of each sampled token and of so many likeliest ones, 0 to 20, by the logits after the
    hook and before temperature, top-k and top-p; None = report none."""
    tenant: str | None
    tags: Mapping[str, str] | None
    """Merged over the tags of the object."""
    request_id: str | None
    """Idempotency key of the usage record; None = a new UUIDv7."""
    cancel: Cancel | None
    """Set it from any thread: the request ends within one token."""
    timeout: float | None
    """Longest time from the making of the request to its last token; then `RequestTimeoutError`. Unit: seconds."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request, checked and ready to run."""

    tokens: tuple[int, ...]
    """Prompt, chat template included; length = input tokens."""
    route: Route
    router: Router
    tier: str | None
    sampling: Sampling
    stops: tuple[str, ...]
    max_tokens: int
    tenant: str
    tags: Mapping[str, str]
    request_id: str
    cancel: Cancel | None
    timeout: float | None
    """Time allowed from creation on; None = any. Unit: seconds."""
    logits_hook: LogitsHook | None = None
    logprobs: int | None = None
    tiers: Mapping[str, Program] = field(default_factory=dict)
    """Programs of the policy's tiers, of which a sink with budgets may choose a cheaper one; see `admission`."""
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    created_ns: int = field(default_factory=time.perf_counter_ns)
    """Monotonic time of creation, for queue time and timeout. Unit: nanoseconds."""

    @property
    def cancelled(self) -> bool:
        """True once the caller has said stop."""
        return self.cancel is not None and self.cancel.is_set()

    @property
    def late(self) -> bool:
        """True once the time allowed is up."""
        return self.timeout is not None and time.perf_counter_ns() - self.created_ns >= self.timeout * 1e9


@dataclass(frozen=True)
class RequestMaker:
    """Makes requests for one model object."""

    encoder: PromptEncoder
    policy: Policy
    cost: CostModel
    context_window: int
    router: Router | None
    tenant: str
    tags: Mapping[str, str]

    def make(self, prompt: Prompt, options: RequestOptions) -> Request:
        """Check a prompt and its options.

        Raises:
            InvalidRequestError: Or one of its kinds, naming the value, the limit and the fix.
            ProgramError: The program cannot or may not run.
        """
        _refuse_unknown(options)
        sampling = Sampling(
            temperature=options.get("temperature", 0.0),
            top_p=options.get("top_p", 1.0),
            top_k=options.get("top_k", 0),
            seed=options.get("seed"),
        )
        tokens = tuple(self.encoder.encode(prompt, options.get("template", "auto")))
        if not tokens:
            raise EmptyPromptError("the prompt is empty; give it at least one token of text.")
        tier, router = self._router(options)
        made = partial(
            Request,
            tokens=tokens,
            router=router,
            tier=tier,
            sampling=sampling,
            stops=_stops(options.get("stop")),
            max_tokens=self._max_tokens(len(tokens), options.get("max_tokens")),
            tenant=_name("tenant", _given(options.get("tenant"), self.tenant)),
            tags={**_tags(self.tags), **_tags(_given(options.get("tags"), {}))},
            request_id=_name("request_id", _given(options.get("request_id"), new_request_id())),
            cancel=_cancel(options.get("cancel")),
            timeout=_timeout(options.get("timeout")),
            logits_hook=_hook(options.get("logits_hook")),
            logprobs=_logprobs(options.get("logprobs")),
            tiers={name: one.program for name, one in self.policy.tiers.items()},
        )
        # Last, since it may run layers: a prompt that does not fit, or an option that is wrong, costs nothing.
        route = router.route(tokens)
        self.policy.check(route.program, self.cost)
        return made(route=route)

    def make_batch(
        self, prompts: Sequence[Prompt], each: Sequence[RequestOptions] | None, shared: RequestOptions
    ) -> list[Request]:
        """Check prompts that will decode together, with what each has of its own laid over what they share.

        Raises:
            InvalidRequestError: Or one of its kinds; also where `prompts` and `each` do not make one batch.
            ProgramError: A program cannot or may not run.
        """
        if isinstance(prompts, str):
            raise InvalidRequestError("generate_batch takes a list of prompts, not one text; use generate, or [text].")
        own: Sequence[RequestOptions] = [{} for _ in prompts] if each is None else each
        if len(own) != len(prompts):
            raise InvalidRequestError(f"each has {len(own)} options for {len(prompts)} prompts; give one per prompt.")
        requests = [self.make(prompt, _over(shared, one)) for prompt, one in zip(prompts, own, strict=True)]
        for request_id, times in Counter(request.request_id for request in requests).most_common(1):
            if times > 1:
                raise InvalidRequestError(
                    f"{times} prompts have the request_id {request_id!r}; give each its own in each=."
                )
        return requests

    def _router(self, options: RequestOptions) -> tuple[str | None, Router]:
        """The tier to record and the router in force: program by hand, else tier, else router, else default tier."""
        program, tier = options.get("program"), options.get("compute")
        if program is not None:
            return None, fixed_router(Program.of(program), self.cost.depth)
        if isinstance(tier, (int, float)):
            return self._at_tolerance(float(tier))
        if isinstance(self.router, LearnedRouter):
            return self.router.serving(tier)
        if tier is None and self.router is not None:
            return None, self.router
        name, chosen = self.policy.program_for(tier, self.cost.depth)
        return name, fixed_router(chosen, self.cost.depth)

    def _at_tolerance(self, tolerance: float) -> tuple[str | None, Router]:
        if not isinstance(self.router, LearnedRouter):
            raise ToleranceError(
                f"compute={tolerance:g} is a tolerance, and no certified router is loaded that could promise it; name "
                "a tier, or load a router with router=."
            )
        return self.router.serving(tolerance)

    def _max_tokens(self, prompt: int, asked: int | None) -> int:
        room = self.context_window - prompt
        if room < 1:
            raise ContextWindowError(
                f"the prompt has {prompt} tokens; the context window is {self.context_window} and the answer needs at "
                "least 1: shorten the prompt."
            )
        if asked is None:
            return min(_DEFAULT_MAX_TOKENS, room)
        try:
            asked = operator.index(asked)
        except TypeError:
            raise SamplingError(f"max_tokens={asked!r} is not a whole number; pass one.") from None
        if asked < 1:
            raise SamplingError(f"max_tokens={asked} is out of range; use 1 or more.")
        if asked > room:
            raise ContextWindowError(
                f"max_tokens={asked} and a prompt of {prompt} tokens exceed the context window of "
                f"{self.context_window}; use max_tokens of at most {room}."
            )
        return asked


def _given(value: T | None, default: T) -> T:
    """Only None means "not given": an empty tenant is a mistake, not the default tenant."""
    return default if value is None else value


def _refuse_unknown(options: RequestOptions) -> None:
    for name in options:
        if name not in RequestOptions.__annotations__:
            raise InvalidRequestError(
                f"option {name!r} is unknown; {did_you_mean(str(name), RequestOptions.__annotations__)}"
            )


def _over(shared: RequestOptions, own: RequestOptions) -> RequestOptions:
    """Options of one row of a batch; its tags are laid over the shared ones, as those over the object's."""
    if not isinstance(own, Mapping):
        raise InvalidRequestError(f"each holds {own!r}; pass a mapping of options per prompt.")
    if alone := sorted(_OF_THE_BATCH & set(own)):
        raise InvalidRequestError(f"{alone[0]} in each= would end one row; it ends the batch: pass it beside each=.")
    merged: RequestOptions = {**shared, **own}
    if shared.get("tags") is not None and own.get("tags") is not None:
        merged["tags"] = {**_tags(_given(shared.get("tags"), {})), **_tags(_given(own.get("tags"), {}))}
    return merged


def _stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for text in stops:
        if not isinstance(text, str):
            raise InvalidRequestError(f"stop {text!r} is not text; use str().")
    if "" in stops:
        raise InvalidRequestError("a stop string is empty, so every answer would end at once; leave it out.")
    return stops


def _name(what: str, value: str) -> str:
    _storable(what, value)
    if not value.strip() or len(value) > _LONGEST_NAME:
        raise TagError(f"{what} {value[:40]!r} has {len(value)} characters; use 1 to {_LONGEST_NAME}, not all blank.")
    return value


def _tags(tags: Mapping[str, str]) -> Mapping[str, str]:
    if not isinstance(tags, Mapping):
        raise TagError(f"tags are {tags!r}; pass a mapping of text to text.")
    for key, value in tags.items():
        _name("tag", key)
        _storable(f"the value of tag {key!r}", value)
    return tags


def _storable(what: str, value: str) -> None:
    """Refuse before compute what no usage record or ledger can hold; afterwards the work would go unmetered."""
    if not isinstance(value, str):
        raise TagError(f"{what} is {value!r}, which is not text; use str().")
    if "\x00" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise TagError(f"{what} {value[:40]!r} holds a null character or a lone surrogate; pass valid Unicode text.")


def _cancel(cancel: Cancel | None) -> Cancel | None:
    if cancel is not None and not callable(getattr(cancel, "is_set", None)):
        raise InvalidRequestError(f"cancel is {cancel!r}; pass something with is_set(), such as threading.Event().")
    return cancel


def _hook(hook: LogitsHook | None) -> LogitsHook | None:
    if hook is not None and not callable(hook):
        raise InvalidRequestError(f"logits_hook is {hook!r}; pass a function of token ids and logits, or None.")
    return hook


def _logprobs(asked: Any) -> int | None:
    if asked is None:
        return None
    try:
        count = operator.index(asked)
    except TypeError:
        raise SamplingError(f"logprobs={asked!r} is not a whole number; pass one, or None.") from None
    if isinstance(asked, bool) or not 0 <= count <= MOST_ALTERNATIVES:
        raise SamplingError(f"logprobs={asked} is out of range; use 0 to {MOST_ALTERNATIVES}, or None.")
    return count


def _timeout(timeout: Any) -> float | None:
    if timeout is None:
        return None
    if not isinstance(timeout, Real):
        raise InvalidRequestError(f"timeout={timeout!r} is not a number; pass seconds, or None.")
    seconds = float(timeout)
    if not (math.isfinite(seconds) and seconds > 0):
        raise InvalidRequestError(f"timeout={timeout} is out of range; use more than 0 seconds, or None.")
    return seconds
