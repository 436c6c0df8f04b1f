"""Common parts of the endpoints that answer: fields, the options they set, and the caller.

A call becomes choices of the engine. Defaults are the engine's: greedy, and 256 tokens. Knows no HTTP.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, cast

from pydantic import Field, WithJsonSchema

from polar_sdk.errors import ContextWindowError, GrammarError, InvalidRequestError, MissingExtraError, SamplingError
from polar_sdk.frameworks.forms import AnswerForm
from polar_sdk.reading import shown
from polar_server.errors import ApiError
from polar_server.openai.fields import (
    Biases,
    Body,
    Labels,
    Name,
    Only,
    Penalty,
    Stops,
    Text,
    Top,
    invalid,
    unsupported,
)
from polar_server.openai.tools import TOOL_CHOICE, TOOLS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from polar_sdk.frameworks.tools import Roles
    from polar_sdk.request.options import Prompt, RequestOptions
    from polar_server.answers import Ask
    from polar_server.openai.catalog import Catalog

_INT64: Final = 2**63
_OPTION: Final = re.compile(r"(logit_bias|regex|grammar|choice)\b")
"""An option of the same name here, with which the engine begins its refusal of a value."""
_AS_THEY_ARE: Final = (
    *("temperature", "top_p", "min_p", "stop", "logit_bias", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "ignore_eos", "stop_repeats", "speculate", "fit_max_tokens"),
)
"""Fields that are options of the engine."""
RESERVED_TAGS: Final = ("key", "polar.")
"""Tags that only the server sets; the second is the beginning of a name."""
_SERVICE_TIERS: Final = {"auto": None, "default": None, "flex": "economy", "priority": "premium"}
"""OpenAI's service tiers, and the tiers they stand for; a tier's own name is one as well."""


@dataclass(frozen=True)
class Caller:
    """The caller, and what its key is bound to.

    Attributes:
        tenant: Who is billed; None = the engine's own.
        tags: Tags of every request, which no body overrides.
        models: The ids it may name; empty = any.
        tiers: The tiers it may use; empty = any.
        max_tokens: Longest answer; None = any.
    """

    tenant: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    tiers: tuple[str, ...] = ()
    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Call:
    """A checked call, ready to be answered."""

    model: str
    """The id that was asked for, which the answer repeats."""
    asks: Sequence[Ask]
    """One per choice, those of one prompt together."""
    prompts: int
    """Number of prompts."""
    stream: bool
    include_usage: bool
    each_usage: bool = False
    """Whether every event of a stream says how many tokens there are so far."""
    prompt_logprobs: bool = False
    """Whether the log-probabilities of the prompt are shown beside the answer."""
    logprobs: int | None
    """How many alternatives to report per token; None = no log-probabilities at all."""
    echo: Sequence[str | Sequence[int]] = ()
    """Prompts that the choices of a text completion repeat, text or token ids; empty = none."""
    only_echo: bool = False
    """Whether the answer itself is not shown: the prompt was to be scored."""
    form: AnswerForm = field(default_factory=AnswerForm)
    """Text, calls of tools, or JSON by a schema."""
    format_param: str = "response_format"
    """The field that asks for JSON by a schema."""
    length_param: str = "max_tokens"
    """The field that says how long the answer may be."""
    constraint: str | None = None
    """The field of ours that says what the answer must match."""
    repeated: Mapping[str, Any] = field(default_factory=dict)
    """Fields that the answer repeats, where the API wants that."""

    @property
    def form_param(self) -> str:
        """The field to blame where the form cannot be enforced."""
        return self.format_param if self.form.use is None else "tools"

    def blamed(self, error: Exception) -> Exception:
        """An error of the engine with the field that is to blame, which the engine cannot know."""
        said = str(error).replace("max_tokens=", f"{self.length_param}=").replace("of max_tokens", "of it")
        length = self.length_param if said.startswith(f"{self.length_param}=") else None
        if isinstance(error, ContextWindowError):
            return ApiError(said, code="context_length_exceeded", param=length)
        if isinstance(error, GrammarError):
            return ApiError(said, param=length or self.constraint or self.form_param)
        if isinstance(error, MissingExtraError):
            return ApiError(str(error), code="unsupported_value", param=self.form_param)
        if type(error) in (InvalidRequestError, SamplingError) and (option := _OPTION.match(said)):
            return ApiError(said, param=option[1])
        return error


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The limits of every call."""

    catalog: Catalog
    caller: Caller
    max_choices: int
    timeout: float | None
    usage_always: bool


class CallBody(Body):
    """The fields of every endpoint that answers."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-_INT64, le=_INT64 - 1)] | None = None
    stream: bool = False
    stream_options: Annotated[Any, WithJsonSchema({"type": "object"})] = None
    user: Name | None = None
    metadata: Labels = Field(default_factory=dict)
    compute: Annotated[Any, WithJsonSchema({"oneOf": [{"type": "string"}, {"type": "number"}]})] = None
    program: Annotated[str, Text(10_000)] | None = None
    tags: Labels = Field(default_factory=dict)
    # Beyond OpenAI's: `polar_sdk.frameworks.options` has the names that other servers give them.
    stop: Stops | None = None
    logit_bias: Biases = Field(default_factory=dict)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=_INT64 - 1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    ignore_eos: bool = False
    stop_repeats: Annotated[int, Field(ge=2, le=1_000)] | None = None
    speculate: Literal["auto", "off", "prompt"] | None = None
    json_schema: Annotated[
        Any, WithJsonSchema({"oneOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]})
    ] = None
    regex: Annotated[str, Text()] | None = None
    choice: Annotated[list[Annotated[str, Text()]], Field(min_length=1, max_length=10_000)] | None = None
    grammar: Annotated[str, Text()] | None = None
    fit_max_tokens: bool = True

    @property
    def constraint(self) -> str | None:
        """The field that says what the answer must match.

        Raises:
            ApiError: There are several.
        """
        given = [name for name in ("json_schema", "regex", "choice", "grammar") if getattr(self, name) is not None]
        if len(given) > 1:
            raise invalid(given[1], f"it excludes {given[0]}; give one of them.")
        if given and self.ignore_eos:
            raise invalid("ignore_eos", f"it excludes {given[0]}; give one of them.")
        return given[0] if given else None

    def call(self, rules: Rules) -> Call:
        """The call of the engine that the body asks for.

        Raises:
            ApiError: It asks for what does not exist or cannot be served.
        """
        raise NotImplementedError

    def stream_settings(self, *known: str) -> Mapping[str, bool]:
        """`stream_options`, of which this API knows some.

        Raises:
            ApiError: There are some without `stream`, or unknown ones.
        """
        options = self.stream_options
        if options is None:
            return {}
        if not self.stream:
            raise invalid("stream_options", "it goes with stream=true only.")
        if not isinstance(options, dict):
            raise invalid("stream_options", f"{shown(options)} is not an object.")
        for name, value in options.items():
            if name not in known or not isinstance(value, bool):
                why = f"{name[:64]}={shown(value)} is not known; use {' or '.join(known)}, true or false."
                raise invalid("stream_options", why)
        if options.get("include_obfuscation"):
            raise invalid("stream_options", "obfuscation is not supported; leave it out.", code="unsupported_value")
        return options


class ChoicesBody(CallBody):
    """The fields of chat and text completions."""

    n: Annotated[int, Field(ge=1, le=128)] = 1
    prompt_logprobs: Top | None = None

    def streamed(self, rules: Rules) -> Mapping[str, bool]:
        """When the usage of a streamed answer comes: at its end, and with each event; the fields of a `Call`.

        Raises:
            ApiError: As `stream_settings`; or what is asked comes with a whole answer only.
        """
        if self.stream and self.prompt_logprobs is not None:
            raise unsupported("stream", "log-probabilities of the prompt are only in whole answers, not in streams.")
        settings = self.stream_settings("include_usage", "continuous_usage_stats", "include_obfuscation")
        asked = settings.get("include_usage", False)
        return {
            "include_usage": self.stream and (asked or rules.usage_always),
            "each_usage": asked and settings.get("continuous_usage_stats", False),
            "prompt_logprobs": self.prompt_logprobs is not None,
        }


class TurnBody(CallBody):
    """The fields of chat completions and responses."""

    tools: Annotated[Any, WithJsonSchema(TOOLS)] = None
    tool_choice: Annotated[Any, WithJsonSchema(TOOL_CHOICE)] = None
    parallel_tool_calls: bool = False
    top_logprobs: Top | None = None
    service_tier: Annotated[str, Text(50)] | None = None
    store: Annotated[None, Only(False, why="answers are not stored; leave it out or pass false.")] = None
    # For OpenAI's own caches and abuse checks: they change no answer.
    prompt_cache_key: Annotated[str, Text(1_000)] | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    safety_identifier: Annotated[str, Text(1_000)] | None = None

    def scored(self, wanted: bool, how: str) -> int | None:
        """How many alternatives per token to report; None = no log-probabilities at all.

        Args:
            wanted: Whether the body asks for log-probabilities.
            how: How it would.

        Raises:
            ApiError: It asks for alternatives alone.
        """
        if not wanted and self.top_logprobs:
            raise invalid("top_logprobs", f"it needs {how}.")
        return (self.top_logprobs or 0) if wanted else None

    def answered(
        self, rules: Rules, messages: Roles, form: AnswerForm, *, max_tokens: int | None, count: int = 1, **facts: Any
    ) -> Call:
        """The call that answers messages.

        Args:
            rules: Of the server and the key.
            messages: Roles and texts.
            form: Of the answer.
            max_tokens: Longest answer.
            count: Number of answers.
            **facts: The other fields of a `Call`.

        Raises:
            ApiError: It cannot be served.
        """
        options = options_of(self, rules)
        form = form.written_as(rules.catalog.engine.call_format)
        if self.constraint is not None and form.options():
            raise invalid(self.constraint, "it excludes tools and response_format; give one of them.")
        own: Any = {"template": "chat", "max_tokens": max_tokens, "logprobs": facts["logprobs"], **form.options()}
        asks = choices_of([form.teach(messages)], {**options, **own}, self, rules, count=count)
        return Call(
            model=self.model,
            asks=asks,
            prompts=1,
            stream=self.stream,
            form=form,
            constraint=self.constraint,
            **facts,
        )


def options_of(body: CallBody, rules: Rules) -> RequestOptions:
    """The options of the engine that a body stands for, seed and log-probabilities aside.

    Raises:
        ApiError: They contradict each other, or name what does not exist.
    """
    compute = _compute(body, rules)
    if body.program is not None and body.compute is not None:
        raise invalid("program", "a program and compute were given; give one of them.")
    _check_bounds(body, compute, rules)
    if body.top_p == 0:
        raise invalid("top_p", "0 allows no token; use more than 0, or temperature 0 for the likeliest.")
    constraint = body.constraint
    options: dict[str, Any] = {name: getattr(body, name) for name in _AS_THEY_ARE}
    options |= {
        "compute": None if body.program is not None else compute,
        "program": body.program,
        "top_k": max(body.top_k, 0),
        "timeout": rules.timeout,
        "tenant": rules.caller.tenant,
        "tags": _tags(body, rules.caller),
    }
    if constraint is not None:
        options["schema" if constraint == "json_schema" else constraint] = getattr(body, constraint)
    if isinstance(body, ChoicesBody):
        options["prompt_logprobs"] = body.prompt_logprobs
    return cast("RequestOptions", options)


def choices_of(
    prompts: Sequence[Prompt], options: RequestOptions, body: CallBody, rules: Rules, *, count: int = 1
) -> list[Ask]:
    """One entry per choice: `count` for each prompt, the seed of each one higher than the last's.

    Raises:
        ApiError: There are too many.
    """
    if count * len(prompts) > rules.max_choices:
        raise invalid("n", f"{len(prompts)} prompts with n={count} are more than {rules.max_choices} choices.")
    asks: list[Ask] = []
    for prompt in prompts:
        for place in range(count):
            # A seed that goes beyond 64 bits comes round.
            seed = None if body.seed is None else (body.seed + place + _INT64) % (2 * _INT64) - _INT64
            asks.append((prompt, {**options, "seed": seed}))
    return asks


def _compute(body: CallBody, rules: Rules) -> str | float | None:
    """The tier or tolerance: of the model's id, of `compute` or of `service_tier`, which may not differ."""
    catalog = rules.catalog
    asked: dict[str, str | float] = {}
    if (tier := catalog.tier_of(body.model)) is not None:
        asked["model"] = tier
    if (compute := body.compute) is not None:
        if isinstance(compute, bool) or not isinstance(compute, str | int | float):
            raise invalid("compute", f"{shown(compute)} is neither a tier nor a tolerance.")
        asked["compute"] = compute
    if (service := body.service_tier if isinstance(body, TurnBody) else None) is not None:
        named = _SERVICE_TIERS.get(service, service)
        if named is not None and named not in catalog.tiers:
            raise invalid("service_tier", f"{service!r} is unknown; use auto, default, {', '.join(catalog.tiers)}.")
        if named is not None:
            asked["service_tier"] = named
    if len(set(asked.values())) > 1:
        said = " and ".join(f"{name} says {value!r}" for name, value in asked.items())
        raise invalid(list(asked)[-1], f"{said}; name one tier.")
    return next(iter(asked.values()), None)


def _check_bounds(body: CallBody, compute: str | float | None, rules: Rules) -> None:
    """Refuse a model or tier that the caller's key is not for."""
    caller, model = rules.caller, body.model
    if not rules.catalog.may_name(model, caller.models, ()):
        raise rules.catalog.missing(model)
    if not caller.tiers:
        return
    if body.program is not None or not isinstance(compute, str | None):
        raise _forbidden("compute" if body.program is None else "program", caller)
    if (compute or rules.catalog.default_tier) not in caller.tiers:
        if rules.catalog.tier_of(model) is not None:
            raise rules.catalog.missing(model)
        raise _forbidden("compute", caller)


def _forbidden(param: str, caller: Caller) -> ApiError:
    message = f"this API key is for the tiers {', '.join(caller.tiers)} only; name one of them."
    return ApiError(message, status=403, code="tier_not_allowed", param=param)


def max_tokens_of(asked: int | None, default: int, rules: Rules, *, name: str = "max_tokens") -> int | None:
    """The longest answer: what is asked for, within what the caller's key allows.

    Args:
        asked: Of the body.
        default: For a caller whose key bounds it, and who asks for nothing.
        rules: Of the server and the key.
        name: Of the field.

    Raises:
        ApiError: It asks for more than the key allows.
    """
    most = rules.caller.max_tokens
    if most is None:
        return asked
    if asked is not None and asked > most:
        raise invalid(name, f"{asked} is more than the {most} that this API key allows.")
    return min(default, most) if asked is None else asked


def _tags(body: CallBody, caller: Caller) -> dict[str, str]:
    """Tags of the usage record; those that a key is bound to win."""
    tags: dict[str, str] = {}
    for name, value in body.metadata.items():
        tags[f"metadata.{name}"] = value
    for name, value in body.tags.items():
        if name == RESERVED_TAGS[0] or name.startswith(RESERVED_TAGS[1]):
            raise invalid("tags", f"the tag {name[:64]!r} is set by the server; choose another name.")
        tags[name] = value
    if body.user is not None:
        tags["user"] = body.user
    return {**tags, **caller.tags}
