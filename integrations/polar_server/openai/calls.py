"""What chat and text completions have in common: the fields, the options they stand for, and who asks.

A call becomes choices of the engine. Defaults are the engine's: greedy, and 256 tokens. Knows no HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

from polar_sdk.errors import GrammarError, MissingExtraError
from polar_sdk.frameworks.forms import AnswerForm
from polar_sdk.reading import shown
from polar_server.errors import ApiError
from polar_server.openai.fields import (
    Body,
    Field,
    anything,
    flag,
    integer,
    invalid,
    mapping,
    number,
    one_of,
    only,
    text,
    texts,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from polar_sdk.request.options import Prompt, RequestOptions
    from polar_server.answers import Ask
    from polar_server.openai.catalog import Catalog

_INT64: Final = 2**63
RESERVED_TAGS: Final = ("key", "polar.")
"""Tags that only the server sets; the second is the beginning of a name."""
_SERVICE_TIERS: Final = {"auto": None, "default": None, "flex": "economy", "priority": "premium"}
"""OpenAI's service tiers, and the tiers they stand for; a tier's own name is one as well."""

WITHOUT_EFFECT: Final[Mapping[str, Field]] = {
    "prompt_cache_key": text(1_000),
    "prompt_cache_retention": one_of("in_memory", "in-memory", "24h"),
    "safety_identifier": text(1_000),
}
"""For OpenAI's own caches and abuse checks: they change no answer."""
SHARED: Final[Mapping[str, Field]] = {
    "model": text(200),
    "max_tokens": integer(1, 2**31 - 1),
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "n": integer(1, 128),
    "seed": integer(-_INT64, _INT64 - 1),
    "stop": texts(4, 1_000),
    "logit_bias": anything({"type": "object"}),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "stream": flag(),
    "stream_options": anything({"type": "object"}),
    "user": text(200),
    "metadata": mapping(16, 512),
    "compute": anything({"oneOf": [{"type": "string"}, {"type": "number"}]}),
    "program": text(10_000),
    "tags": mapping(16, 512),
}


@dataclass(frozen=True)
class Caller:
    """Who asks: what a key is bound to.

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
    logprobs: int | None
    """How many alternatives to report per token; None = no log-probabilities at all."""
    echo: Sequence[str | Sequence[int]] = ()
    """What each choice of a text completion repeats before its answer, text or token ids; empty = nothing."""
    only_echo: bool = False
    """Whether the answer itself is not shown: the prompt was to be scored."""
    form: AnswerForm = field(default_factory=AnswerForm)
    """Text, calls of tools, or JSON by a schema."""
    format_param: str = "response_format"
    """The field that asks for JSON by a schema."""
    repeated: Mapping[str, Any] = field(default_factory=dict)
    """What the answer says of its call, where the API repeats it."""

    @property
    def form_param(self) -> str:
        """The field to blame where the form cannot be enforced."""
        return self.format_param if self.form.use is None else "tools"

    def blamed(self, error: Exception) -> Exception:
        """An error of the engine with the field that is to blame, which the engine cannot know."""
        if isinstance(error, GrammarError):
            return ApiError(str(error), param=self.form_param)
        if isinstance(error, MissingExtraError):
            return ApiError(str(error), code="unsupported_value", param=self.form_param)
        return error


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a server allows every call."""

    catalog: Catalog
    caller: Caller
    max_choices: int
    timeout: float | None
    usage_always: bool


def options_of(body: Body, rules: Rules) -> RequestOptions:
    """The options of the engine that a body stands for, seed and log-probabilities aside.

    Raises:
        ApiError: They contradict each other, or name what does not exist.
    """
    compute = _compute(body, rules)
    program = body.get("program")
    if program is not None and body.get("compute") is not None:
        raise invalid("program", "a program and compute were given; give one of them.")
    _check_bounds(body, compute, rules)
    top_p = body.get("top_p", 1.0)
    if top_p == 0:
        raise invalid("top_p", "0 allows no token; use more than 0, or temperature 0 for the likeliest.")
    options = {
        "compute": None if program is not None else compute,
        "program": program,
        "temperature": body.get("temperature", 0.0),
        "top_p": top_p,
        "stop": body.get("stop"),
        "logits_hook": _hook(body),
        "timeout": rules.timeout,
        "tenant": rules.caller.tenant,
        "tags": _tags(body, rules.caller),
    }
    return cast("RequestOptions", options)


def choices_of(prompts: Sequence[Prompt], options: RequestOptions, body: Body, rules: Rules) -> list[Ask]:
    """One entry per choice: `n` for each prompt, the seed of each one higher than the last's.

    Raises:
        ApiError: There are too many.
    """
    count, seed = body.get("n", 1), body.get("seed")
    if count * len(prompts) > rules.max_choices:
        raise invalid("n", f"{len(prompts)} prompts with n={count} are more than {rules.max_choices} choices.")
    asks: list[Ask] = []
    for prompt in prompts:
        for place in range(count):
            own: RequestOptions = {**options, "seed": None if seed is None else _wrapped(seed + place)}
            asks.append((prompt, own))
    return asks


def streaming(body: Body, rules: Rules) -> tuple[bool, bool]:
    """Whether the answer is streamed, and whether its usage comes at the end.

    Raises:
        ApiError: `stream_options` without `stream`, or with what is not known.
    """
    stream, options = bool(body.get("stream", False)), body.get("stream_options")
    if options is None:
        return stream, stream and rules.usage_always
    if not stream:
        raise invalid("stream_options", "it goes with stream=true only.")
    if not isinstance(options, dict):
        raise invalid("stream_options", f"{shown(options)} is not an object.")
    for name, value in options.items():
        if name not in ("include_usage", "include_obfuscation") or not isinstance(value, bool):
            raise invalid("stream_options", f"{name[:64]}={shown(value)} is not known; use include_usage=true.")
    if options.get("include_obfuscation"):
        raise invalid("stream_options", "obfuscation is not supported; leave it out.", code="unsupported_value")
    return stream, options.get("include_usage", False) or rules.usage_always


def unserved(why: str) -> Field:
    """A field of OpenAI's that this server cannot serve, unless it says nothing."""
    return only(None, False, [], {}, why=why)


def _wrapped(seed: int) -> int:
    """A seed that went beyond 64 bits comes round."""
    return (seed + _INT64) % (2 * _INT64) - _INT64


def _compute(body: Body, rules: Rules) -> str | float | None:
    """The tier or tolerance: of the model's id, of `compute` or of `service_tier`, which may not differ."""
    catalog = rules.catalog
    asked: dict[str, str | float] = {}
    if (tier := catalog.tier_of(body.get("model"))) is not None:
        asked["model"] = tier
    if (compute := body.get("compute")) is not None:
        if isinstance(compute, bool) or not isinstance(compute, str | int | float):
            raise invalid("compute", f"{shown(compute)} is neither a tier nor a tolerance.")
        asked["compute"] = compute
    if (service := body.get("service_tier")) is not None:
        named = _SERVICE_TIERS.get(service, service)
        if named is not None and named not in catalog.tiers:
            raise invalid("service_tier", f"{service!r} is unknown; use auto, default, {', '.join(catalog.tiers)}.")
        if named is not None:
            asked["service_tier"] = named
    if len(set(asked.values())) > 1:
        said = " and ".join(f"{name} says {value!r}" for name, value in asked.items())
        raise invalid(list(asked)[-1], f"{said}; name one tier.")
    return next(iter(asked.values()), None)


def _check_bounds(body: Body, compute: str | float | None, rules: Rules) -> None:
    """Refuse a model or tier that the caller's key is not for."""
    caller, model = rules.caller, body.get("model")
    if not rules.catalog.may_name(model, caller.models, ()):
        raise rules.catalog.missing(model)
    if not caller.tiers:
        return
    if body.get("program") is not None or not isinstance(compute, str | None):
        raise _forbidden("program" if body.get("program") is not None else "compute", caller)
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


def _tags(body: Body, caller: Caller) -> dict[str, str]:
    """Tags of the usage record; those that a key is bound to win."""
    tags: dict[str, str] = {}
    for name, value in body.get("metadata", {}).items():
        tags[f"metadata.{name}"] = value
    for name, value in body.get("tags", {}).items():
        if name == RESERVED_TAGS[0] or name.startswith(RESERVED_TAGS[1]):
            raise invalid("tags", f"the tag {name[:64]!r} is set by the server; choose another name.")
        tags[name] = value
    if (user := body.get("user")) is not None:
        tags["user"] = user
    return {**tags, **caller.tags}


class Steering:
    """Biases and penalties on logits, as OpenAI defines them.

    A token's logit gets its bias, less `frequency` for each time it was sampled, less `presence` if it ever was.
    """

    def __init__(self, bias: Mapping[int, float], presence: float, frequency: float) -> None:
        self._bias, self._presence, self._frequency = bias, presence, frequency

    def fields(self) -> dict[str, Any]:
        """The fields of a body that say the same."""
        biases = {str(token): bias for token, bias in self._bias.items()}
        penalties = {"presence_penalty": self._presence, "frequency_penalty": self._frequency}
        return {**({"logit_bias": biases} if biases else {}), **{name: by for name, by in penalties.items() if by}}

    def __call__(self, tokens: Sequence[int], logits: Tensor) -> Tensor:
        """Change logits (V,) after `tokens`."""
        import torch

        for token, bias in self._bias.items():
            if token < len(logits):
                logits[token] += bias
        if tokens and (self._presence or self._frequency):
            sampled = torch.tensor(tokens, device=logits.device)
            counts = torch.zeros_like(logits).index_add_(0, sampled, torch.ones_like(sampled, dtype=logits.dtype))
            logits -= self._frequency * counts + self._presence * (counts > 0)
        return logits


def _hook(body: Body) -> Steering | None:
    presence, frequency = body.get("presence_penalty", 0.0), body.get("frequency_penalty", 0.0)
    bias = _bias(body.get("logit_bias", {}))
    return Steering(bias, presence, frequency) if bias or presence or frequency else None


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > 1_000:
        raise invalid("logit_bias", "it must be an object of at most 1,000 token ids and numbers.")
    bias = {}
    limits = number(-100, 100)
    for name, amount in value.items():
        if not name.isascii() or not name.isdigit() or len(name) > 9:
            raise invalid("logit_bias", f"{shown(name)} is not a token id.")
        bias[int(name)] = limits.check("logit_bias", amount)
    return bias


def require_model(body: Body) -> None:
    """Refuse a call that names no model.

    Raises:
        ApiError: It does not.
    """
    if body.get("model") is None:
        raise ApiError(
            "model: name one of those that GET /v1/models lists.", code="missing_required_parameter", param="model"
        )
