"""From what a caller asks to what the engine runs: tier to program, and every check before compute.

Knows an encoder of prompts, a policy and a cost model; runs nothing but a router. A request that gets past here can be
served.
"""

from __future__ import annotations

import operator
import secrets
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from polar_sdk.engine.sampling import Sampling
from polar_sdk.engine.steering import Steering
from polar_sdk.errors import (
    ContextWindowError,
    EmptyPromptError,
    InvalidRequestError,
    SamplingError,
    ToleranceError,
)
from polar_sdk.programs.program import Program
from polar_sdk.reading import shown
from polar_sdk.request.constraint import CONSTRAINTS, grammar_text
from polar_sdk.request.floors import FLOOR_TAG, RAISED_TAG
from polar_sdk.request.options import (
    RequestOptions,
    check_biases,
    check_cancel,
    check_hook,
    check_logprobs,
    check_name,
    check_number,
    check_repeats,
    check_speculate,
    check_stops,
    check_tags,
    check_timeout,
    or_default,
    override,
    refuse_unknown,
)
from polar_sdk.router.base import StaticRouter, fixed_router
from polar_sdk.router.learned import AtSetting, LearnedRouter, Serving
from polar_sdk.serving.request import Request
from polar_sdk.usage import FALLBACK_TAG, new_request_id

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from polar_sdk.engine.grammar import Grammar, GrammarCompiler
    from polar_sdk.programs.cost import CostModel
    from polar_sdk.programs.floors import Floor
    from polar_sdk.programs.policy import Policy
    from polar_sdk.request.encoder import PromptEncoder
    from polar_sdk.request.floors import FloorRules
    from polar_sdk.request.options import Prompt
    from polar_sdk.router.base import Route, Router
    from polar_sdk.router.certificate import AnswerForm
    from polar_sdk.serving.drafts import Speculate

_DEFAULT_MAX_TOKENS = 256
_MARGIN_KEY: Final = secrets.token_bytes(16)
"""A key of this process, which nobody sees."""


def never(promise: str) -> bool:
    """No promise is at risk."""
    return False


@dataclass(frozen=True)
class RequestMaker:
    """Makes requests for one model object."""

    encoder: PromptEncoder
    grammars: Callable[[], GrammarCompiler]
    end_tokens: Callable[[], frozenset[int]]
    policy: Policy
    cost: CostModel
    context_window: int
    router: Router | None
    tenant: str
    tags: Mapping[str, str]
    speculate: Speculate | None
    """Default of requests; None = as `auto` where drafts change no answer, to the bit."""
    drafts_are_exact: Callable[[], bool]
    """Whether that may be so of a row that starts now."""
    at_risk: Callable[[str], bool]
    """Whether the promise of a digest is; waits for nothing."""
    floors: FloorRules
    """They go before everything that a caller asks for."""

    def make(self, prompt: Prompt, options: RequestOptions) -> Request:
        """Check a prompt and its options.

        Raises:
            InvalidRequestError: Or a subclass.
            ProgramError: The program cannot or may not run.
        """
        refuse_unknown(options)
        sampling = Sampling(
            temperature=options.get("temperature", 0.0),
            top_p=options.get("top_p", 1.0),
            top_k=options.get("top_k", 0),
            min_p=options.get("min_p", 0.0),
            seed=options.get("seed"),
        )
        tokens = self._tokens(prompt, options)
        tenant, tags = self._whose(options)
        floor = self._floor(prompt, tokens, options, tenant, tags)
        form: AnswerForm = "text" if options.get("choice") is None else "choice"
        served, raised = self._router(options, floor, form)
        router = served.router
        scored = check_logprobs(options.get("prompt_logprobs"), "prompt_logprobs")
        tiers = {
            name: tier.program
            for name, tier in self.policy.tiers.items()
            if (scored is None or not tier.program.fills) and (floor is None or floor.allows(name))
        }
        max_tokens = self._max_tokens(len(tokens), options.get("max_tokens"))
        request = partial(
            Request,
            tokens=tokens,
            router=router.kind,
            router_version=router.version,
            tier=served.tier,
            promises=tuple(each for each in served.promises if form == "text" or each.choices),
            chooses=form == "choice",
            sampling=sampling,
            stops=check_stops(options.get("stop")),
            max_tokens=max_tokens,
            tenant=tenant,
            tags={
                **tags,
                **({} if served.instead_of is None else {FALLBACK_TAG: served.instead_of}),
                **({} if floor is None else {FLOOR_TAG: floor.name}),
                **raised,
            },
            request_id=check_name("request_id", or_default(options.get("request_id"), new_request_id())),
            id_is_new=options.get("request_id") is None,
            cancel=check_cancel(options.get("cancel")),
            timeout=check_timeout(options.get("timeout")),
            steering=self._steering(options) or None,
            stop_repeats=check_repeats(options.get("stop_repeats")),
            logits_hook=check_hook(options.get("logits_hook")),
            logprobs=check_logprobs(options.get("logprobs")),
            prompt_logprobs=scored,
            grammar=self._grammar(options, max_tokens, tenant),
            speculate=self._speculate(options.get("speculate")),
            fit_max_tokens=bool(options.get("fit_max_tokens", True)),
            tiers=tiers,
        )
        # Last, so that an invalid option costs nothing.
        route = self._route(router, tokens, form, scored=scored is not None)
        return request(program=route.program, router_flops=route.flops, likeness=route.likeness)

    def make_batch(
        self, prompts: Sequence[Prompt], each: Sequence[RequestOptions] | None, shared: RequestOptions
    ) -> list[Request]:
        """Check prompts that will decode together; the options of each override the shared ones.

        Raises:
            InvalidRequestError: Or a subclass; also where `prompts` and `each` differ in length.
            ProgramError: A program cannot or may not run.
        """
        if isinstance(prompts, str):
            raise InvalidRequestError(
                "generate_batch takes a list of prompts, not one text; use generate, or pass [text]."
            )
        own: Sequence[RequestOptions] = [{} for _ in prompts] if each is None else each
        if len(own) != len(prompts):
            raise InvalidRequestError(f"each= has {len(own)} entries for {len(prompts)} prompts; pass one per prompt.")
        requests = [self.make(prompt, override(shared, options)) for prompt, options in zip(prompts, own, strict=True)]
        for request_id, times in Counter(request.request_id for request in requests).most_common(1):
            if times > 1:
                raise InvalidRequestError(
                    f"{times} prompts have the request_id {request_id!r}; pass each its own in each=."
                )
        return requests

    def floor_of(self, prompt: Prompt, options: RequestOptions) -> Floor | None:
        """The floor that applies to a request.

        Raises:
            InvalidRequestError: Or a subclass.
        """
        if not self.floors.floors:
            return None
        tokens, (tenant, tags) = self._tokens(prompt, options), self._whose(options)
        return self._floor(prompt, tokens, options, tenant, tags)

    def _tokens(self, prompt: Prompt, options: RequestOptions) -> tuple[int, ...]:
        if (least := self.encoder.more_than(prompt, self.context_window)) is not None:
            raise ContextWindowError(
                f"the prompt has at least {least:,} tokens; the context window is {self.context_window}: shorten the "
                "prompt."
            )
        tokens = tuple(self.encoder.encode(prompt, options.get("template", "auto"), options.get("tools")))
        if not tokens:
            raise EmptyPromptError("the prompt is empty; give it at least one token of text.")
        return tokens

    def _whose(self, options: RequestOptions) -> tuple[str, dict[str, str]]:
        """Tenant and tags of a request."""
        tags = {**check_tags(self.tags), **check_tags(or_default(options.get("tags"), {}))}
        return check_name("tenant", or_default(options.get("tenant"), self.tenant)), tags

    def _floor(
        self, prompt: Prompt, tokens: tuple[int, ...], options: RequestOptions, tenant: str, tags: Mapping[str, str]
    ) -> Floor | None:
        template, tools = options.get("template", "auto"), bool(options.get("tools"))
        return self.floors.of(prompt, tokens, template, tenant, (self.tags, tags), tools=tools)

    def _steering(self, options: RequestOptions) -> Steering:
        ignores = options.get("ignore_eos", False)
        if not isinstance(ignores, bool):
            raise InvalidRequestError(f"ignore_eos={shown(ignores)} is neither True nor False.")
        if ignores and any(options.get(name) is not None for name in CONSTRAINTS):
            raise InvalidRequestError(
                "ignore_eos=True cannot be combined with schema, regex, choice or grammar; leave it out."
            )
        return Steering(
            bias=check_biases(options.get("logit_bias"), self.encoder.vocabulary),
            presence=check_number("presence_penalty", options.get("presence_penalty", 0.0), -2, 2),
            frequency=check_number("frequency_penalty", options.get("frequency_penalty", 0.0), -2, 2),
            repetition=check_number("repetition_penalty", options.get("repetition_penalty", 1.0), 0.01, 100),
            forbidden=tuple(sorted(self.end_tokens())) if ignores else (),
        )

    def _speculate(self, asked: Speculate | None) -> Speculate | None:
        speculate = check_speculate(or_default(asked, self.speculate))
        return speculate if speculate is not None or self.drafts_are_exact() else "off"

    def _route(self, router: Router, tokens: tuple[int, ...], form: AnswerForm, *, scored: bool) -> Route:
        if isinstance(router, AtSetting):
            router = router.answering(form)
        if self.policy.margin and isinstance(router, AtSetting):
            router = router.within(self.policy.margin, _MARGIN_KEY)
        route = router.route(tokens)
        if scored and route.program.fills:
            raise InvalidRequestError(
                f"program {route.program.text!r} does not run all layers for the tokens of a prompt, so it gives "
                "them no log-probabilities; use compute='exact', or a program without fills."
            )
        self.policy.check(route.program, self.cost)
        return route

    def _router(self, options: RequestOptions, floor: Floor | None, form: AnswerForm) -> tuple[Serving, dict[str, str]]:
        """Find the router that serves a request, and a tag with what was asked for where a floor raised it."""
        served = self._asked(options)
        if floor is None or self._is_kept(floor, served, form):
            return served, {}
        program, compute = options.get("program"), options.get("compute")
        by_hand = None if program is None else Program.of(program).text
        asked = by_hand or or_default(compute, served.tier) or served.router.kind
        return self._asked({"compute": floor.floor}), {RAISED_TAG: str(asked)}

    def _is_kept(self, floor: Floor, served: Serving, form: AnswerForm) -> bool:
        """Whether what was asked for is not below a floor."""
        router = served.router
        if served.tier is not None:
            return floor.allows(served.tier)
        if isinstance(router, AtSetting):  # a tolerance: the lower θ, the closer to full depth
            lowest = self._asked({"compute": floor.floor}).router
            return isinstance(lowest, AtSetting) and router.setting.of(form) <= lowest.setting.of(form)
        programs = [own.program for name, own in self.policy.tiers.items() if floor.allows(name)]
        allowed = [Program.identity(self.cost.depth), *programs]
        return isinstance(router, StaticRouter) and router.program in allowed

    def _asked(self, options: RequestOptions) -> Serving:
        """The tier to record and the router asked for: program by hand, else tier, else router, else default tier."""
        program, tier = options.get("program"), options.get("compute")
        if program is not None:
            return Serving(None, fixed_router(Program.of(program), self.cost.depth))
        if isinstance(tier, (int, float)):
            try:
                tolerance = float(tier)
            except OverflowError:
                raise ToleranceError(f"compute={shown(tier)} is too large; use a share below 1.") from None
            if not isinstance(self.router, LearnedRouter):
                raise ToleranceError(
                    f"compute={tolerance:g} is a tolerance, but no certified router is loaded that could promise it; "
                    "use a tier, or load a router with router=."
                )
            return self.router.serving(tolerance, self.at_risk)
        if isinstance(self.router, LearnedRouter):
            return self.router.serving(tier, self.at_risk)
        if tier is None and self.router is not None:
            return Serving(None, self.router)
        name, chosen = self.policy.program_for(tier, self.cost.depth)
        return Serving(name, fixed_router(chosen, self.cost.depth))

    def _grammar(self, options: RequestOptions, max_tokens: int, tenant: str) -> Grammar | None:
        text = grammar_text(options)
        if text is None:
            return None
        grammar = self.grammars().compile(text, tenant)
        if options.get("fit_max_tokens", True):
            grammar.check_fits(max_tokens)
        return grammar

    def _max_tokens(self, prompt: int, max_tokens: int | None) -> int:
        room = self.context_window - prompt
        if room < 1:
            raise ContextWindowError(
                f"the prompt has {prompt} tokens; the context window is {self.context_window} and the answer needs at "
                "least 1: shorten the prompt."
            )
        if max_tokens is None:
            return min(_DEFAULT_MAX_TOKENS, room)
        try:
            max_tokens = operator.index(max_tokens)
        except TypeError:
            raise SamplingError(f"max_tokens={shown(max_tokens)} is not a whole number; pass one.") from None
        if max_tokens < 1:
            raise SamplingError(f"max_tokens={shown(max_tokens)} is out of range; use 1 or more.")
        if max_tokens > room:
            raise ContextWindowError(
                f"max_tokens={shown(max_tokens)} and a prompt of {prompt} tokens exceed the context window of "
                f"{self.context_window}; use max_tokens of at most {room}."
            )
        return max_tokens
