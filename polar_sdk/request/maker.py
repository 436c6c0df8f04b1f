"""From what a caller asks to what the engine runs: prompt to tokens, tier to program, and every check before compute.

Knows a tokenizer with its chat template, a policy and a cost model; runs nothing but a router. A request that gets past
here can be served.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polar_sdk.engine.sampling import Sampling
from polar_sdk.errors import ContextWindowError, EmptyPromptError, InvalidRequestError, SamplingError, ToleranceError
from polar_sdk.programs.program import Program
from polar_sdk.request.options import (
    RequestOptions,
    check_cancel,
    check_hook,
    check_logprobs,
    check_name,
    check_stops,
    check_tags,
    check_timeout,
    or_default,
    override,
    refuse_unknown,
)
from polar_sdk.router.base import fixed_router
from polar_sdk.router.learned import LearnedRouter
from polar_sdk.serving.request import Request
from polar_sdk.usage import new_request_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from polar_sdk.engine.route import Route
    from polar_sdk.programs.cost import CostModel
    from polar_sdk.programs.policy import Policy
    from polar_sdk.request.options import Prompt, Template
    from polar_sdk.router.base import Router

_DEFAULT_MAX_TOKENS = 256


class PromptEncoder:
    """Encodes texts and chat messages for one tokenizer and its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @property
    def has_chat_template(self) -> bool:
        """True where messages can be rendered."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    def plain(self, text: str) -> list[int]:
        """Token ids of a text, no template, no special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def encode(self, prompt: str | Sequence[Mapping[str, str]], template: Template = "auto") -> list[int]:
        """Token ids of a prompt.

        Args:
            prompt: A text, or chat messages.
            template: See `RequestOptions`.

        Raises:
            EmptyPromptError: The prompt holds no text.
            InvalidRequestError: A template that the model lacks, a message without role or content, or broken Unicode.
        """
        if template not in ("auto", "chat", "raw"):
            raise InvalidRequestError(f"template {template!r} is unknown; use auto, chat or raw.")
        try:
            if isinstance(prompt, str):
                return self._text(prompt, template)
            untyped: Any = prompt
            if isinstance(untyped, bytes) or not isinstance(untyped, Sequence):
                raise InvalidRequestError(
                    f"the prompt is of type {type(prompt).__name__}; pass a text or a list of messages."
                )
            return self._chat(prompt, template)
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the prompt contains a lone surrogate at character {error.start}; pass valid Unicode text."
            ) from error

    def _text(self, text: str, template: Template) -> list[int]:
        text.encode()  # the tokenizer's own error for broken Unicode names nothing
        if not text.strip():
            raise EmptyPromptError(f"the prompt is empty ({len(text)} blank characters); give it some text.")
        if template == "chat" or (template == "auto" and self.has_chat_template):
            return self._render([{"role": "user", "content": text}])
        # `raw`: the caller has placed every special token; otherwise the tokenizer adds its own.
        return list(self.tokenizer.encode(text, add_special_tokens=template != "raw"))

    def _chat(self, messages: Sequence[Mapping[str, str]], template: Template) -> list[int]:
        if template == "raw":
            raise InvalidRequestError("template 'raw' takes a text, not messages; render them first.")
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise InvalidRequestError(f"message {index} is {message!r}; each needs the keys 'role' and 'content'.")
            for key in ("role", "content"):
                if not isinstance(message[key], str):
                    raise InvalidRequestError(
                        f"message {index} has the {key} {message[key]!r}; it must be text: join its parts first."
                    )
                message[key].encode()
        if not any(message["content"].strip() for message in messages):
            raise EmptyPromptError(f"the prompt is empty ({len(messages)} messages without text); give it some text.")
        return self._render(messages)

    def _render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if not self.has_chat_template:
            raise InvalidRequestError("this model has no chat template; pass a text with template='raw'.")
        from jinja2 import TemplateError

        plain: list[Any] = [dict(message) for message in messages]
        try:
            rendered = self.tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise InvalidRequestError(f"the model's chat template refuses these messages: {error}.") from error
        return list(self.tokenizer.encode(str(rendered), add_special_tokens=False))


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
            InvalidRequestError: Or a subclass.
            ProgramError: The program cannot or may not run.
        """
        refuse_unknown(options)
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
        return Request(
            tokens=tokens,
            router=router.kind,
            router_version=router.version,
            tier=tier,
            sampling=sampling,
            stops=check_stops(options.get("stop")),
            max_tokens=self._max_tokens(len(tokens), options.get("max_tokens")),
            tenant=check_name("tenant", or_default(options.get("tenant"), self.tenant)),
            tags={**check_tags(self.tags), **check_tags(or_default(options.get("tags"), {}))},
            request_id=check_name("request_id", or_default(options.get("request_id"), new_request_id())),
            cancel=check_cancel(options.get("cancel")),
            timeout=check_timeout(options.get("timeout")),
            logits_hook=check_hook(options.get("logits_hook")),
            logprobs=check_logprobs(options.get("logprobs")),
            tiers={name: tier.program for name, tier in self.policy.tiers.items()},
            # Last, since it may run layers: a prompt that does not fit, or an invalid option, costs nothing.
            route=self._route(router, tokens),
        )

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

    def _route(self, router: Router, tokens: tuple[int, ...]) -> Route:
        route = router.route(tokens)
        self.policy.check(route.program, self.cost)
        return route

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
                f"compute={tolerance:g} is a tolerance, but no certified router is loaded that could promise it; use a "
                "tier, or load a router with router=."
            )
        return self.router.serving(tolerance)

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
            raise SamplingError(f"max_tokens={max_tokens!r} is not a whole number; pass one.") from None
        if max_tokens < 1:
            raise SamplingError(f"max_tokens={max_tokens} is out of range; use 1 or more.")
        if max_tokens > room:
            raise ContextWindowError(
                f"max_tokens={max_tokens} and a prompt of {prompt} tokens exceed the context window of "
                f"{self.context_window}; use max_tokens of at most {room}."
            )
        return max_tokens
