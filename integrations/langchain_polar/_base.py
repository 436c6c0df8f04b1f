"""What `PolarLLM` and `ChatPolar` share: settings, options of a call, the engine behind them, cache keys.

Constructing loads nothing: LangChain builds model objects freely (`configurable_fields` makes one per call).
Weights come from the engine's process-wide cache on first use. Knows no messages and no callbacks.
"""

from __future__ import annotations

import asyncio
import difflib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr, field_validator, model_validator

from langchain_polar._caller import CALLER_OPTIONS, Caller
from langchain_polar._facts import cached_metadata, cached_record
from langchain_polar._serving import Call
from langchain_polar.errors import langchain_errors
from polar_sdk.loading import DEFAULT_ALIAS, MODEL_VARIABLE
from polar_sdk.policy import Policy
from polar_sdk.program import Program
from polar_sdk.sinks import AUTO_LEDGER, find_sink
from polar_sdk.usage import UsageSink

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from langchain_core.language_models.base import LangSmithParams

    from polar_sdk import PolarModel as Engine
else:
    Engine = Any  # importing the class would import torch

__all__ = ["PolarBase"]

_IGNORED: Final = frozenset({"api_key", "max_retries", "stream"})
"""Per-call options that other models take and that mean nothing here; `stream` has done its work in
LangChain."""
_ENGINE_SETTINGS: Final = ("revision", "device", "dtype", "policy", "ledger", "sink")
"""What `engine=` brings along."""
_loading = threading.RLock()
"""Held while an engine is made, so that threads that start together load once."""


class PolarBase(BaseModel):
    """Settings of a PoLar model; those marked *per call* may also be passed to `invoke` and its kin."""

    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())

    model: str | None = Field(default_factory=lambda: os.environ.get(MODEL_VARIABLE) or None)
    """Alias, hub id, folder or `.gguf` file; None = the default model. Read from `POLAR_MODEL`. Per call."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    compute: str | None = None
    """Tier: economy, standard, premium or exact; None = the policy's default. Per call."""
    program: Program | str | None = None
    """A program by hand, e.g. `0-11 18-29`; wins over `compute`. Per call."""
    temperature: float = 0.0
    """0 = greedy. Per call."""
    top_p: float = 1.0
    """Share of probability sampled from. Per call."""
    top_k: int = 0
    """Number of tokens sampled from; 0 = all. Per call."""
    max_tokens: int | None = None
    """Most tokens of the answer; None = 256, or what the context window leaves. Per call."""
    stop: list[str] = Field(default_factory=list)
    """Texts that end the answer and are no part of it. Per call; LangChain's `stop=` replaces them."""
    seed: int | None = None
    """Makes sampling repeatable. Per call."""
    timeout: float | None = None
    """Longest time of one call; then it stops and raises `PolarTimeoutError`. Unit: seconds. Per call."""
    streaming: bool | None = None
    """True = `invoke` streams, so that callbacks see tokens; None = only `stream` does."""
    tenant: str = "default"
    """Who is charged. Per call, or as `config={"metadata": {"tenant": …}}`."""
    usage_tags: dict[str, str] = Field(default_factory=dict)
    """Tags on usage records (LangChain's own `tags` are for tracing; they too are recorded). Per call:
    merged."""
    ledger: str | None = AUTO_LEDGER
    """`"auto"`, a ledger URL, or None to meter nothing."""
    sink: UsageSink | None = Field(default=None, exclude=True, repr=False)
    """Where usage records go, instead of a ledger."""
    policy: Policy | str | Path | None = None
    """Policy or policy file; None = the one shipped for the model."""
    device: str = "auto"
    """`auto`, or a torch device such as `cpu` or `cuda:1`."""
    dtype: str = "auto"
    """`auto`, `float32`, `bfloat16` or `float16`."""
    engine: Engine | None = Field(default=None, exclude=True, repr=False)
    """A `PolarModel` at hand, used as it is: one that you have set up yourself, or
    `polar_sdk.testing.tiny_model()`."""
    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)
    """Ignored: the model runs here. Taken so that code written for a hosted model runs unchanged."""
    max_retries: int | None = Field(default=None, exclude=True, repr=False)
    """Ignored: no network lies between, so the same request would fail the same way."""

    _engines: dict[str | None, Engine] = PrivateAttr(default_factory=dict)
    """Engines by the model's name, the `model=` of a call included."""

    per_call: ClassVar[frozenset[str]] = frozenset(
        {"model", "compute", "program", "temperature", "top_p", "top_k", "max_tokens", "seed", "timeout"}
    )
    """Settings that a call may change; `stop` and the caller's options have their own way in."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_settings(cls, values: Any) -> Any:
        if isinstance(values, dict):
            _refuse_unknown(values, cls.model_fields, cls.__name__)
        return values

    @field_validator("model", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return str(value.absolute()) if isinstance(value, Path) else value

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_as_list(cls, value: Any) -> Any:
        if value is None:
            return []
        return [value] if isinstance(value, str) else list(value)

    @field_validator("engine")
    @classmethod
    def _engine_is_one(cls, value: Any) -> Any:
        if value is not None:
            from polar_sdk import PolarModel

            if not isinstance(value, PolarModel):
                raise ValueError(f"engine= takes a polar_sdk.PolarModel, not {type(value).__name__}")
        return value

    @model_validator(mode="after")
    def _engine_stands_alone(self) -> Self:
        if self.engine is None:
            return self
        defaults = type(self).model_fields
        if clash := [name for name in _ENGINE_SETTINGS if getattr(self, name) != defaults[name].default]:
            raise ValueError(f"engine= brings its own {clash[0]}: pass {clash[0]}= to the PolarModel instead.")
        return self

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """False: a sink cannot be written as JSON, and a copy without its sink would not be metered."""
        return False

    @property
    def model_name(self) -> str:
        """Name of the model for traces and usage; loads nothing."""
        if self.engine is not None and self.model is None:
            return self.engine.name
        return self.model or DEFAULT_ALIAS

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """All that an answer depends on: LangChain's caches and traces tell models apart by it."""
        return {
            "model": self.model_name,
            "model_fingerprint": None if self.engine is None else self.engine.fingerprint,
            "router": None if self.engine is None else _router_name(self.engine),
            "policy": str(self.engine.policy if self.engine is not None else self.policy),
            "revision": self.revision,
            "dtype": self.dtype if self.engine is None else self.engine.dtype,
            "compute": self.compute,
            "program": None if self.program is None else str(self.program),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "default_stop": list(self.stop),
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params: LangSmithParams = super()._get_ls_params(stop=stop, **kwargs)  # type: ignore[misc]
        params["ls_provider"] = "polar"
        params["ls_model_name"] = kwargs.get("model") or self.model_name
        return params

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of a plain text, by the model's own tokenizer."""
        own = getattr(self, "custom_get_token_ids", None)
        return list(own(text)) if own is not None else self._engine().encode(text)

    def _engine(self) -> Engine:
        """The engine, loaded on first use."""
        if self.engine is not None and self.model in (None, self.engine.name):
            return self.engine
        if self.model not in self._engines:
            with _loading, langchain_errors():
                if self.model not in self._engines:  # another thread may have been faster
                    self._engines[self.model] = self._load()
        return self._engines[self.model]

    def _load(self) -> Engine:
        from polar_sdk import PolarModel

        return PolarModel.from_pretrained(
            self.model,
            revision=self.revision,
            device=self.device,
            dtype=self.dtype,
            policy=self.policy,
            ledger=self.ledger,
            sink=self.sink if self.engine is None else self.engine.sink,
        )

    def _with_options(self, options: Mapping[str, Any]) -> Self:
        """A copy with the options of one call as its settings, so that cache keys and traces see them.

        Raises:
            TypeError: An option that does not exist, with the nearest that does.
        """
        _refuse_unknown(options, {*self.per_call, *CALLER_OPTIONS, *_IGNORED}, f"a call of {type(self).__name__}")
        update = {name: value for name, value in options.items() if name in self.per_call}
        if update.get("compute") is not None:
            update.setdefault("program", None)  # a program of the object must not outvote the tier of the call
        if isinstance(update.get("model"), Path):
            update["model"] = str(update["model"].absolute())
        return self.model_copy(update=update) if update else self

    def _call(self, options: Mapping[str, Any], stop: Sequence[str] | None, caller: Caller) -> Call:
        """Make one call of the engine ready; loads it if need be."""
        bound = self._with_options(options)
        return Call(bound._engine(), bound._engine_options(stop), self._caller(caller, options), bound.timeout)

    async def _acall(self, options: Mapping[str, Any], stop: Sequence[str] | None, caller: Caller) -> Call:
        """As `_call`; loading weights does not block the event loop."""
        return await asyncio.to_thread(self._call, options, stop, caller)

    def _engine_options(self, stop: Sequence[str] | None) -> dict[str, Any]:
        return {
            "compute": self.compute,
            "program": self.program,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "stop": self.stop if stop is None else stop,
        }

    def _caller(self, caller: Caller, options: Mapping[str, Any]) -> Caller:
        """Call over config over object; under all of them lie the tenant and tags of an engine at hand."""
        own = self.tenant if self.engine is None or self.tenant != "default" else None
        named = caller.with_call(options)
        return Caller(named.tenant or own, {**self.usage_tags, **named.tags}, named.request_id)

    def _settle_cached(self, metadata: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """Record that LangChain answered from its cache, and return the metadata that says so."""
        with langchain_errors():
            engine = self._engines.get(self.model, self.engine)
            if engine is None:  # answered by a cache on disk before any weights were loaded
                sink = find_sink(self.ledger, self.sink)
            else:
                sink, caller = engine.sink, caller.over(engine.tenant, engine.tags)
            record = cached_record(metadata, caller, self.tenant)
            return cached_metadata(metadata, record, sink.emit(record))


def _router_name(engine: Engine) -> str | None:
    router = engine.router
    return None if router is None else f"{router.kind} {router.version} {getattr(router, 'program', '')}".strip()


def _refuse_unknown(given: Mapping[str, Any], known: Collection[str], whose: str) -> None:
    unknown = [name for name in given if name not in known]
    if not unknown:
        return
    if unknown[0] in ("tools", "tool_choice", "functions", "response_format"):
        raise NotImplementedError(f"{unknown[0]}= is not supported: this model writes text alone.")
    close = difflib.get_close_matches(unknown[0], sorted(known), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(sorted(known))}."
    raise TypeError(f"{unknown[0]!r} is no setting of {whose}; {hint}")
