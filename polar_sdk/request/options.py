"""Options of a model object and of each request, and the check of each option. Knows no model, and imports no torch."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

from polar_sdk.errors import AuditError, InvalidRequestError, SamplingError, TagError, did_you_mean
from polar_sdk.models.load import LoadOptions
from polar_sdk.reading import shown
from polar_sdk.usage import flaw_of_name, flaw_of_text

if TYPE_CHECKING:
    from pathlib import Path

    from polar_sdk.engine.sampling import LogitsHook
    from polar_sdk.programs.policy import Policy
    from polar_sdk.programs.program import Program
    from polar_sdk.request.constraint import Schema
    from polar_sdk.router.base import Router
    from polar_sdk.serving.drafts import Speculate
    from polar_sdk.serving.request import Cancel
    from polar_sdk.usage import UsageSink

Message = Mapping[str, Any]
"""One chat message: `role` (system, user, assistant) and `content`; other keys are passed to the chat template."""
Prompt = str | Sequence[Message] | Sequence[int]
Template = Literal["auto", "chat", "raw"]
T = TypeVar("T")
MAX_BIASES = 1_000
MAX_STOPS = 256
"""The engine's thread searches for each of them after every token."""
MAX_STOP_LENGTH = 1_000
"""Unit: characters."""
_MAX_NAME = 200
_SHOWN_IDS = 8
"""As many as a usage record stores. Unit: characters."""
_SPECULATE = ("auto", "off", "prompt")
_BATCH_OPTIONS = frozenset({"cancel", "timeout"})
"""Options that end a batch as a whole."""


@dataclass(frozen=True, kw_only=True)
class Audits:
    """How answers of certified tiers are audited; their share is `audit_share`.

    Attributes:
        key: File with the key that selects requests; None = `audit.key` in the user's data folder, made when needed.
        tenant: The provider's own tenant, which pays.
        keep: Tenants whose audited prompts are kept for `polar recalibrate`; `*` = all, none by default.
        keep_days: How long they are kept. Unit: days.
        unusual: What happens if prompts are found unlike those of the calibration: `exact` serves full depth until
            they are usual again, `audit` only audits more of them.
    """

    key: str | Path | None = None
    tenant: str = "polar.audit"
    keep: Collection[str] = ()
    keep_days: float = 30.0
    unusual: Literal["exact", "audit"] = "exact"

    def __post_init__(self) -> None:
        check_name("the tenant of audits", self.tenant)
        if isinstance(self.keep, str):
            raise AuditError(f"keep={self.keep!r} is one text; pass a list of tenants, such as [{self.keep!r}].")
        if not 0 < self.keep_days < math.inf:
            raise AuditError(f"keep_days={shown(self.keep_days)} is out of range; use a number of days above 0.")
        if self.unusual not in ("exact", "audit"):
            raise AuditError(f"unusual={shown(self.unusual)} is unknown; use 'exact' or 'audit'.")


class ModelOptions(LoadOptions, total=False):
    """Keyword options of `PolarModel.from_pretrained`: how the weights are loaded, and what this object does."""

    policy: Policy | str | Path | None
    """Policy or policy file; None = the one shipped for the model."""
    router: Router | str | Path | None
    """Router or its folder; None = the one shipped for the model, unless `policy` is given."""
    maps: str | Path | Sequence[str | Path]
    """Folder of bridges or fills that `polar lab heal` wrote, or several."""
    ledger: str | None
    """`"auto"` (the default), a ledger URL, or None to turn metering off."""
    sink: UsageSink | None
    """Receives usage records instead of a ledger."""
    tenant: str
    """Tenant of requests that name none."""
    tags: Mapping[str, str] | None
    """Tags of every request."""
    audit_share: float | Mapping[str, float] | None
    """Share of requests that are audited, one for all tiers or by tier; None = 0.005 with a ledger, otherwise 0."""
    audits: Audits | None
    """Further settings of audits."""
    speculate: Speculate | None
    """`auto`, `prompt` or `off`: the default of requests for drafting tokens. None, the default: `auto` if the answer
    stays the same to the bit, otherwise `off`."""


class RequestOptions(TypedDict, total=False):
    """Keyword options of `PolarModel.generate` and similar methods."""

    template: Template
    """`auto`: a plain text becomes one user message if the model has a chat template; `chat`: the model must have one;
    `raw`: the text is used unchanged, and special tokens in it are recognised; only the beginning-of-text token is
    added, if the tokenizer does so by default and the text has none. With `auto` and `chat`, special tokens in a text
    or message stay plain text."""
    tools: Sequence[Mapping[str, Any]] | None
    """Functions that the chat template shows to the model, in OpenAI's form; the template must support tools. Messages
    may then have `tool_calls`, and the role `tool`. Tools do not restrict the answer; use `grammar` for that."""
    compute: str | float | None
    """Tier: economy, standard, premium or exact; or a tolerance that a certified router promises, such as 0.05: the
    largest share of answers that may differ from identity's. None = the default tier."""
    program: Program | str | None
    """A program by hand; takes precedence over `compute` and the router."""
    max_tokens: int | None
    """Maximum number of tokens in the answer; None = 256, or what the context window leaves."""
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    """Minimum probability of a token, relative to the likeliest; 0 = all."""
    seed: int | None
    stop: str | Sequence[str] | None
    """Texts that end the answer; they are not part of it."""
    stop_repeats: int | None
    """End an answer whose last tokens are the same part of at most 64 tokens N times in a row, and at least 16 tokens:
    small models that choose greedily may repeat themselves forever. The record then has the tag `polar.stopped_by` =
    `repeats`. N is 2 or more; None = never."""
    ignore_eos: bool
    """Keep the model from ending its answer. Cannot be combined with schema, regex, choice or grammar."""
    presence_penalty: float
    """Subtracted from the logit of each token that is in the answer, -2 to 2."""
    frequency_penalty: float
    """Subtracted once per occurrence in the answer, -2 to 2."""
    repetition_penalty: float
    """Logits of tokens in prompt or answer are divided by it, or multiplied if negative, 0.01 to 100; 1 = unchanged."""
    logit_bias: Mapping[int, float] | None
    """Numbers added to the logits of tokens, by token id, -100 to 100 each."""
    logits_hook: LogitsHook | None
    """Called before each token is chosen, greedily or not: (ids sampled so far, float32 logits (V,)) → logits (V,).
    It blocks all rows and must not call the model; an error in it ends this request only."""
    schema: Schema | None
    """JSON schema that the answer must match: a mapping, JSON text, or a class such as a pydantic model; `{}` = any
    JSON, `{"type": "object"}` = any JSON object. This and the next three need the extra `structured`; pass only one of
    them. The model does not see it: say in the prompt what to write."""
    regex: str | None
    """Regular expression that the whole answer must match, in Rust's syntax: no look-around, no back-references."""
    choice: Sequence[str] | None
    """Texts of which the answer must be one."""
    grammar: str | None
    """Grammar that the answer must match: Lark, as llguidance reads it, where `%json {…}` is a JSON schema; or
    llama.cpp's GBNF."""
    fit_max_tokens: bool
    """When an answer with a schema, regular expression, choice or grammar comes near `max_tokens`, allow only tokens
    after which it can still end in time, so that texts and lists end early instead of being cut off. Default: True."""
    speculate: Speculate | None
    """Draft tokens and run them together with the one sampled last: `auto` where that pays, also from earlier answers
    to the tenant; `prompt` wherever the last tokens occurred before in prompt or answer; `off` never. The answer is the
    same. None = the default of the model object."""
    logprobs: int | None
    """Report the log-probability of each sampled token and of the N likeliest ones, N from 0 to 20, by the logits after
    the hook and the grammar and before temperature, top-k and top-p; None = report none."""
    prompt_logprobs: int | None
    """Report the same for the prompt's own tokens, all but the first. The head runs for each of them, and no prefix is
    reused from an earlier request. Cannot be combined with a program that fills layers for the prompt."""
    tenant: str | None
    """Tenant to bill. Names of tenants, tags and requests have no surrounding whitespace and no control characters."""
    tags: Mapping[str, str] | None
    """Tags of the record; they override the tags of the model object, name by name."""
    request_id: str | None
    """Idempotency key of the usage record. The meter refuses one that was already used, before compute. None = a new
    UUIDv7."""
    cancel: Cancel | None
    """Set it from any thread: the request ends within one pass."""
    timeout: float | None
    """Maximum time from the creation of the request to its last token; then `RequestTimeoutError`. Unit: seconds."""


def split_loading(options: ModelOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that say how weights are loaded, and those of the model object.

    Raises:
        TypeError: An option does not exist; the message names the nearest that does.
    """
    for name in options:
        if name not in ModelOptions.__annotations__:
            raise TypeError(f"PolarModel has no option {name!r}; {did_you_mean(name, ModelOptions.__annotations__)}")
    own: dict[str, Any] = dict(options)
    return {name: own.pop(name) for name in LoadOptions.__annotations__ if name in own}, own


def ending_on(cancel: Cancel, options: RequestOptions) -> RequestOptions:
    """The options of a call that ends when `cancel` is set."""
    return {**options, "cancel": cancel}


def or_default(value: T | None, default: T) -> T:
    """Only None means "not set": an empty tenant is a mistake, not the default tenant."""
    return default if value is None else value


def refuse_unknown(options: RequestOptions) -> None:
    """Refuse an option that does not exist, naming the nearest one that does."""
    for name in options:
        if name not in RequestOptions.__annotations__:
            raise InvalidRequestError(
                f"option {name!r} is unknown; {did_you_mean(str(name), RequestOptions.__annotations__)}"
            )


def override(shared: RequestOptions, own: RequestOptions) -> RequestOptions:
    """Options of one row of a batch; its tags override the shared ones, as those override the object's."""
    if not isinstance(own, Mapping):
        raise InvalidRequestError(f"each= contains {own!r}; pass one mapping of options per prompt.")
    for name in sorted(_BATCH_OPTIONS & set(own)):
        raise InvalidRequestError(f"{name} ends the whole batch, so each= cannot contain it; pass it outside of each=.")
    merged: RequestOptions = {**shared, **own}
    shared_tags, own_tags = shared.get("tags"), own.get("tags")
    if shared_tags is not None and own_tags is not None:
        merged["tags"] = {**check_tags(shared_tags), **check_tags(own_tags)}
    return merged


def check_name(what: str, value: str) -> str:
    """A tenant, a request id or the name of a tag: short text, not blank, without surrounding whitespace.

    It is accepted unchanged or refused: two names that differ are never charged as one.
    """
    _check_text(what, value)
    if not value.strip() or len(value) > _MAX_NAME:
        raise TagError(f"{what} {value[:40]!r} has {len(value)} characters; use 1 to {_MAX_NAME}, not only blanks.")
    if (flaw := flaw_of_name(value)) is not None:
        raise TagError(f"{what} {value[:40]!r} {flaw}; remove it.")
    return value


def check_tags(tags: Mapping[str, str]) -> Mapping[str, str]:
    """Tags whose names and values a usage record can hold."""
    if not isinstance(tags, Mapping):
        raise TagError(f"tags is {tags!r}; pass a mapping of text to text.")
    for key, value in tags.items():
        check_name("tag", key)
        _check_text(f"the value of tag {key!r}", value)
        if (flaw := flaw_of_text(value)) is not None:
            raise TagError(f"the value of tag {key!r}, {value[:40]!r}, {flaw}; remove it.")
    return tags


def _check_text(what: str, value: object) -> None:
    if not isinstance(value, str):
        raise TagError(f"{what} is {value!r}, which is not text; use str().")


def check_stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The texts that end an answer, none of them empty."""
    try:
        stops = (stop,) if isinstance(stop, str) else tuple(islice(() if stop is None else stop, MAX_STOPS + 1))
    except TypeError:
        raise InvalidRequestError(f"stop={shown(stop)} is neither text nor a list of texts; pass one.") from None
    if len(stops) > MAX_STOPS:
        raise InvalidRequestError(f"there are more than {MAX_STOPS} stop strings; pass at most {MAX_STOPS}.")
    for text in stops:
        if not isinstance(text, str):
            raise InvalidRequestError(f"stop {shown(text)} is not text; use str().")
        if len(text) > MAX_STOP_LENGTH:
            raise InvalidRequestError(
                f"stop {shown(text)} has {len(text):,} characters; use at most {MAX_STOP_LENGTH:,}."
            )
    if "" in stops:
        raise InvalidRequestError("a stop string is empty, so every answer would end at once; remove it.")
    return stops


def check_cancel(cancel: Cancel | None) -> Cancel | None:
    """Something with `is_set`, or None."""
    if cancel is not None and not callable(getattr(cancel, "is_set", None)):
        raise InvalidRequestError(f"cancel is {cancel!r}; pass something with is_set(), such as threading.Event().")
    return cancel


def check_number(name: str, value: Any, least: float, most: float) -> float:
    """A number within bounds."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise SamplingError(f"{name}={shown(value)} is not a number; pass one.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not least <= number <= most:
        raise SamplingError(f"{name}={shown(value)} is out of range; use {least:g} to {most:g}.")
    return number


def check_biases(biases: Any, vocabulary: int | None = None) -> Mapping[int, float]:
    """Biases of tokens by their ids, which JSON has as texts; none for None.

    Args:
        biases: As given.
        vocabulary: Number of ids that the model has, where that is known.

    Raises:
        SamplingError: They are no such thing.
    """
    if biases is None:
        return {}
    if not isinstance(biases, Mapping) or len(biases) > MAX_BIASES:
        raise SamplingError(f"logit_bias={shown(biases)} is not a mapping of at most {MAX_BIASES:,} token ids.")
    read: dict[int, float] = {}
    wrong: list[str] = []
    for token, bias in biases.items():
        written = token if isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 10 else None
        index = int(written) if written is not None else token
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            wrong.append(shown(token))
        else:
            read[index] = check_number(f"logit_bias[{index}]", bias, -100, 100)
    if wrong:
        listed = ", ".join(wrong[:_SHOWN_IDS]) + (", …" if len(wrong) > _SHOWN_IDS else "")
        raise SamplingError(f"logit_bias has {listed}: not token ids, which are whole numbers from 0.")
    if vocabulary is not None and (beyond := [token for token in read if token >= vocabulary]):
        raise SamplingError(f"logit_bias has token {min(beyond)}; ids of this model are 0 to {vocabulary - 1}.")
    return read


def check_repeats(times: Any) -> int | None:
    """How often a part may be repeated, or None."""
    if times is None:
        return None
    if isinstance(times, bool) or not isinstance(times, int):
        raise InvalidRequestError(f"stop_repeats={shown(times)} is not a whole number; pass one, or None.")
    if not 2 <= times <= 1_000:
        raise InvalidRequestError(f"stop_repeats={shown(times)} is out of range; use 2 to 1,000, or None.")
    return times


def check_hook(hook: LogitsHook | None) -> LogitsHook | None:
    """A function of token ids and logits, or None."""
    if hook is not None and not callable(hook):
        raise InvalidRequestError(f"logits_hook is {hook!r}; pass a function of token ids and logits, or None.")
    return hook


def check_logprobs(logprobs: Any, name: str = "logprobs") -> int | None:
    """How many alternatives to report per token, or None."""
    from polar_sdk.engine.sampling import MAX_ALTERNATIVES  # with torch, which whoever checks names does not need

    if logprobs is None:
        return None
    try:
        count = operator.index(logprobs)
    except TypeError:
        raise SamplingError(f"{name}={shown(logprobs)} is not a whole number; pass one, or None.") from None
    if isinstance(logprobs, bool) or not 0 <= count <= MAX_ALTERNATIVES:
        raise SamplingError(f"{name}={shown(logprobs)} is out of range; use 0 to {MAX_ALTERNATIVES}, or None.")
    return count


def check_speculate(speculate: Any) -> Speculate | None:
    """`auto`, `off`, `prompt` or None."""
    if speculate is not None and speculate not in _SPECULATE:
        raise InvalidRequestError(f"speculate={shown(speculate)} is unknown; use {', '.join(_SPECULATE)} or None.")
    checked: Speculate | None = speculate
    return checked


def check_timeout(timeout: Any) -> float | None:
    """The max time in seconds, or None."""
    if timeout is None:
        return None
    if not isinstance(timeout, Real):
        raise InvalidRequestError(f"timeout={shown(timeout)} is not a number; pass seconds, or None.")
    try:
        seconds = float(timeout)
    except OverflowError:
        seconds = math.inf
    if not (math.isfinite(seconds) and seconds > 0):
        raise InvalidRequestError(f"timeout={shown(timeout)} is out of range; use more than 0 seconds, or None.")
    return seconds
