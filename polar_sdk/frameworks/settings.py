"""Settings that frameworks' model classes share, for a model that loads on first use.

Frameworks construct model objects freely, so constructing one loads nothing and imports no torch; weights come from the
engine's process-wide cache. Knows no framework.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from polar_sdk.errors import did_you_mean
from polar_sdk.frameworks.options import CLASS_NAMES, INSTEAD
from polar_sdk.locks import renewed_in_child
from polar_sdk.models.aliases import DEFAULT_ALIAS, MODEL_VARIABLE
from polar_sdk.models.load import LoadOptions
from polar_sdk.programs.policy import Policy
from polar_sdk.programs.program import Program
from polar_sdk.router.base import Router
from polar_sdk.sinks import AUTO_LEDGER
from polar_sdk.usage import UsageSink

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from polar_sdk import PolarModel as Engine
else:
    Engine = Any  # importing the class would import torch


CALLER_OPTIONS: Final = ("tenant", "usage_tags", "request_id")
"""Options of a call that name the caller; they do not change the answer."""
_CONSTRAINTS: Final = ("json_schema", "regex", "choice", "grammar")
"""Settings for what an answer must match; at most one may be set."""
_PER_CALL: Final = (
    *("compute", "program", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "timeout"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "stop_repeats", "ignore_eos"),
    *(*_CONSTRAINTS, "fit_max_tokens", "speculate", "logprobs"),
)
"""Settings that are options of the engine by the same name, but for `json_schema`, there `schema`."""
_OBJECT_SETTINGS: Final = ("policy", "router", "ledger", "sink", "audit_share")
_ENGINE_SETTINGS: Final = (*LoadOptions.__annotations__, *_OBJECT_SETTINGS)
"""Settings that belong to `engine=`, besides the model."""
_TOOL_OPTIONS: Final = ("tools", "tool_choice", "parallel_tool_calls", "response_format")
_loading = renewed_in_child(threading.RLock())
"""Held while an engine is loaded, so that threads that start together load it once."""


class ModelSettings(BaseModel):
    """Settings of a PoLar model; those marked *per call* may also be passed with each call."""

    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())

    model: str | None = None
    """Alias, hub id, folder or `.gguf` file; None = `POLAR_MODEL`, otherwise the default model."""
    compute: str | float | None = None
    """Tier: economy, standard, premium or exact; or a tolerance that a certified router promises, such as 0.05; None =
    the default tier. Per call."""
    program: Program | str | None = None
    """A program by hand, e.g. `0-11 18-29`; overrides `compute`. Per call."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy. Per call."""
    top_p: float = 1.0
    """Sample from the likeliest tokens up to this total probability. Per call."""
    top_k: int = 0
    """Sample from this number of likeliest tokens; 0 = all. Per call."""
    min_p: float = 0.0
    """Minimum probability of a token, relative to the likeliest; 0 = all. Per call."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token in the answer, -2 to 2. Per call."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the answer, -2 to 2. Per call."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens in prompt or answer; 1 = unchanged. Per call."""
    logit_bias: dict[int, float] | None = None
    """Numbers added to the logits of tokens, by token id, -100 to 100. Per call."""
    stop_repeats: int | None = None
    """End an answer that repeats the same text N times in a row; `stopped_by` then says so. Per call."""
    ignore_eos: bool = False
    """Keep the model from ending its answer. Per call."""
    logprobs: bool | int | None = None
    """Report the log-probability of each answer token, with N alternatives; True = without. Per call."""
    max_tokens: int | None = None
    """Maximum number of tokens in the answer; None = 256, or what the context window leaves. Per call."""
    stop: list[str] = Field(default_factory=list)
    """Texts that end the answer and are not part of it. Per call."""
    seed: int | None = None
    """Seed that makes sampling repeatable. Per call."""
    timeout: float | None = None
    """Maximum time of one answer; then it stops and raises `RequestTimeoutError`. Unit: seconds. Per call."""
    json_schema: Any = None
    """JSON schema that the answer matches: a mapping, JSON text, or a class such as a pydantic model. This and the next
    three need the extra `structured`; the model does not see them. Per call."""
    regex: str | None = None
    """Regular expression that the whole answer must match. Per call."""
    choice: list[str] | None = None
    """Texts of which the answer must be one. Per call."""
    grammar: str | None = None
    """Lark grammar that the answer must match. Per call."""
    fit_max_tokens: bool = True
    """Steer an answer that must match something to an end within `max_tokens`. Per call."""
    speculate: Literal["auto", "off", "prompt"] | None = None
    """Draft tokens that followed before, and keep those that are right: `auto`, `prompt` or `off`; None = what the
    engine does by default. The answer is the same. Per call."""
    tenant: str = "default"
    """Who is billed. Per call."""
    usage_tags: dict[str, str] = Field(default_factory=dict)
    """Tags on usage records; those of a call override them. Per call."""
    ledger: str | None = AUTO_LEDGER
    """`"auto"`, a ledger URL, or None to turn metering off."""
    sink: UsageSink | None = Field(default=None, exclude=True, repr=False)
    """Receives usage records instead of a ledger."""
    tracing: bool = False
    """Set usage and cost of each answer on OpenTelemetry's current span; needs the extra `tracing`."""
    policy: Policy | str | Path | None = None
    """Policy or policy file; None = the one shipped for the model."""
    router: Router | str | Path | None = None
    """Router, or the folder of one; None = the one shipped for the model, if its certificate holds here."""
    audit_share: float | dict[str, float] | None = None
    """Share of certified tiers' answers to audit, one or by tier; None = 0.005 with a ledger, otherwise 0."""
    # How the weights are loaded: `polar_sdk.models.load.LoadOptions` says what each field means.
    revision: str | None = None
    device: str = "auto"
    device_map: str | dict[str, Any] | None = None
    precision: str = "auto"
    kv_memory: int | None = None
    engine: Engine | None = Field(default=None, exclude=True, repr=False)
    """A `PolarModel` to use: one that you have set up, or `polar_sdk.testing.tiny_model()`."""

    _engines: dict[str | None, Engine] = PrivateAttr(default_factory=dict)
    """Engines by the model's name; copies of the object share them."""

    per_call: ClassVar[frozenset[str]] = frozenset(_PER_CALL)
    """Settings that a call may change; `CALLER_OPTIONS` name the caller."""
    dropped: ClassVar[frozenset[str]] = frozenset()
    """Options of a call that are accepted, and are not settings."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_settings(cls, values: Any) -> Any:
        if isinstance(values, dict):
            values = _renamed(values, cls.model_fields, cls.__name__)
            _refuse_unknown(values, cls.model_fields, cls.__name__)
        return values

    @field_validator("model", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return str(value.absolute()) if isinstance(value, Path) else value

    @field_validator("stop", mode="before")
    @classmethod
    def _single_stop_as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else list(value or ())

    @field_validator("engine")
    @classmethod
    def _check_engine(cls, value: Any) -> Any:
        if value is not None:
            from polar_sdk import PolarModel

            if not isinstance(value, PolarModel):
                raise ValueError(f"engine= takes a polar_sdk.PolarModel, not {type(value).__name__}")
        return value

    @model_validator(mode="after")
    def _model_or_engine(self) -> Self:
        if self.engine is None:
            self.model = self.model or os.environ.get(MODEL_VARIABLE) or None
            return self
        defaults = type(self).model_fields
        clash = [name for name in _ENGINE_SETTINGS if getattr(self, name) != defaults[name].default]
        if self.model not in (None, self.engine.name):
            clash.append("model")
        if clash:
            raise ValueError(f"engine= has its own {clash[0]}: pass {clash[0]}= to the PolarModel instead.")
        return self

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A copy with separate settings, which uses the same engines, router and sink."""
        memo = {} if memo is None else memo
        memo |= {id(part): part for part in (self._engines, self.engine, self.router, self.sink)}
        return super().__deepcopy__(memo)

    def __getstate__(self) -> dict[Any, Any]:
        """The settings, for a copy in another process, which loads the weights anew.

        Raises:
            TypeError: It has an engine or a sink, which belong to this process; the copy would answer with another
                model, or be metered elsewhere.
        """
        for name in ("engine", "sink"):
            if getattr(self, name) is not None:
                raise TypeError(
                    f"a {type(self).__name__} with {name}= cannot be pickled; name model= and ledger= instead, "
                    "or make one in each process."
                )
        bare = self.model_copy()
        bare._engines = {}
        return super(ModelSettings, bare).__getstate__()

    @property
    def model_name(self) -> str:
        """Name of the model for traces and usage; loads nothing."""
        if self.engine is not None and self.model is None:
            return self.engine.name
        return self.model or DEFAULT_ALIAS

    @property
    def _own_tenant(self) -> str | None:
        """The object's tenant; None = that of the given engine."""
        return self.tenant if self.engine is None or self.tenant != "default" else None

    def _engine(self) -> Engine:
        """The engine, loaded on first use."""
        if self.engine is not None and self.model in (None, self.engine.name):
            return self.engine
        if self.model not in self._engines:
            with _loading:
                if self.model not in self._engines:  # another thread may have been faster
                    self._engines[self.model] = self._load()
        return self._engines[self.model]

    def _load(self) -> Engine:
        from polar_sdk import PolarModel

        loading: Any = {name: getattr(self, name) for name in LoadOptions.__annotations__}
        return PolarModel.from_pretrained(
            self.model,
            **loading,
            policy=self.policy,
            router=self.router,
            ledger=self.ledger,
            sink=self.sink if self.engine is None else self.engine.sink,
            audit_share=self.audit_share,
        )

    def _with_options(self, options: Mapping[str, Any]) -> Self:
        """A copy with the options of one call as its settings.

        Raises:
            TypeError: An option does not exist; the message names the nearest that does.
        """
        known = {*self.per_call, *CALLER_OPTIONS, *self.dropped}
        options = _renamed(options, known, f"a call of {type(self).__name__}")
        _refuse_unknown(options, known, f"a call of {type(self).__name__}")
        update = {name: value for name, value in options.items() if name in self.per_call}
        if update.get("compute") is not None:
            update.setdefault("program", None)  # a program of the object must not override the tier of the call
        if any(update.get(name) is not None for name in _CONSTRAINTS):
            update = {**dict.fromkeys(_CONSTRAINTS), **update}  # that of a call replaces the object's
        if isinstance(update.get("model"), Path):
            update["model"] = str(update["model"].absolute())
        return self.model_copy(update=update) if update else self

    def _answer_options(self) -> dict[str, Any]:
        """Engine options that determine the answer."""
        options = {name: getattr(self, name) for name in _PER_CALL}
        options["schema"] = options.pop("json_schema")
        if isinstance(self.logprobs, bool):
            options["logprobs"] = 0 if self.logprobs else None
        return options


def _renamed(values: Mapping[str, Any], known: Collection[str], owner: str) -> dict[str, Any]:
    """Settings under our names, translated from those of other model classes.

    Raises:
        TypeError: One is there under two names, or is not ours; the message says what to use.
    """
    read: dict[str, Any] = {name: value for name, value in values.items() if name in known}
    for name, value in values.items():
        own = CLASS_NAMES.get(name, name)
        if name in known:
            continue
        if name in INSTEAD:
            if value is not None:
                raise TypeError(f"{owner} has no setting {name!r}: {INSTEAD[name]}.")
        elif own not in known or own == name:
            read[name] = value
        elif value is not None:
            given = read.get(own)
            if given is not None and given is not True and given != value:
                raise TypeError(
                    f"{owner}: {name}={value!r} and {own}={given!r} are the same setting; pass one of them."
                )
            read[own] = value
    return read


def _refuse_unknown(names: Iterable[str], known: Collection[str], owner: str) -> None:
    for name in names:
        if name in known:
            continue
        if name in _TOOL_OPTIONS:
            raise NotImplementedError(f"{name}= is not supported by {owner}: it completes text; use the chat model.")
        raise TypeError(f"{owner} has no setting {name!r}; {did_you_mean(name, known)}")
