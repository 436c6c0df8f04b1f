"""Settings of the LlamaIndex model, the options of one call, and the engine behind them.

Constructing loads nothing; weights come from the engine's process-wide cache on first use. Knows no messages.
"""

from __future__ import annotations

import difflib
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from llama_index_instrumentation.dispatcher import active_instrument_tags
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from llama_index_polar.errors import PolarTimeoutError
from polar_sdk.errors import InvalidRequestError
from polar_sdk.loading import DEFAULT_ALIAS, MODEL_VARIABLE
from polar_sdk.policy import Policy
from polar_sdk.program import Program
from polar_sdk.sinks import AUTO_LEDGER
from polar_sdk.usage import UsageSink

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from polar_sdk import Generation
    from polar_sdk import PolarModel as Engine
else:
    Engine = Any  # importing the class would import torch

__all__ = ["Deadline", "PolarSettings"]

_ANSWERING: Final = ("compute", "program", "temperature", "top_p", "top_k", "max_tokens", "stop", "seed")
"""Settings that the engine takes by the same name."""
_PER_CALL: Final = frozenset({*_ANSWERING, "timeout", "tenant", "usage_tags", "request_id"})
_ENGINE_SETTINGS: Final = ("model", "revision", "device", "dtype", "policy", "ledger", "sink")
"""What `engine=` brings along."""
_loading = threading.RLock()
"""Held while an engine is made, so that threads that start together load once."""


class Deadline:
    """A `cancel` that is set once the time is up; the engine looks at it before every pass."""

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and seconds <= 0:
            raise InvalidRequestError(f"timeout={seconds} is out of range; use more than 0 seconds, or None.")
        self._seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    def is_set(self) -> bool:
        """True once the time is up."""
        return self._end is not None and time.monotonic() >= self._end

    def check(self, generation: Generation) -> Generation:
        """Return the answer, unless the time was up before it was finished.

        Raises:
            PolarTimeoutError: It was cut short.
        """
        if generation.finish_reason == "cancelled" and self.is_set():
            tokens = generation.usage.tokens.output
            raise PolarTimeoutError(
                f"the answer was stopped by timeout={self._seconds} s after {tokens} tokens.",
                hint="Raise timeout, lower max_tokens, or use a cheaper tier.",
                usage=generation.usage,
            )
        return generation


class PolarSettings(BaseModel):
    """Settings of a PoLar model; those marked *per call* may also be passed to `chat` and its kin."""

    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())

    model: str | None = Field(default_factory=lambda: os.environ.get(MODEL_VARIABLE) or None)
    """Alias, hub id, folder or `.gguf` file; None = the default model. Read from `POLAR_MODEL`."""
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
    max_tokens: int = 256
    """Most tokens of the answer; LlamaIndex keeps this much of the context window free. Per call."""
    stop: list[str] = Field(default_factory=list)
    """Texts that end the answer and are no part of it. Per call."""
    seed: int | None = None
    """Makes sampling repeatable. Per call."""
    timeout: float | None = None
    """Longest time of one call; then it stops and raises `PolarTimeoutError`. Unit: seconds. Per call."""
    tenant: str = "default"
    """Who is charged. Per call, or as `instrument_tags({"tenant": …})` around any LlamaIndex call."""
    usage_tags: dict[str, str] = Field(default_factory=dict)
    """Tags on usage records; those of `instrument_tags` are laid over them, then those of the call."""
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
    """A `PolarModel` at hand, used as it is: one that you set up, or `polar_sdk.testing.tiny_model()`."""

    _loaded: Engine | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_settings(cls, values: Any) -> Any:
        if isinstance(values, dict):
            _refuse_unknown(values, {*cls.model_fields, "class_name"}, cls.__name__)
        return values

    @field_validator("model", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return str(value.absolute()) if isinstance(value, Path) else value

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else list(value or ())

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
        if self.engine is not None:
            fields = type(self).model_fields
            for name in _ENGINE_SETTINGS:
                if getattr(self, name) != fields[name].get_default(call_default_factory=True):
                    raise ValueError(f"engine= brings its own {name}: pass {name}= to the PolarModel instead.")
        return self

    @property
    def model_name(self) -> str:
        """Name of the model for traces; loads nothing."""
        return self.engine.name if self.engine is not None else self.model or DEFAULT_ALIAS

    def _engine(self) -> Engine:
        """The engine, loaded on first use."""
        if self.engine is not None:
            return self.engine
        if self._loaded is None:
            with _loading:
                if self._loaded is None:  # another thread may have been faster
                    self._loaded = self._load()
        return self._loaded

    def _load(self) -> Engine:
        from polar_sdk import PolarModel

        return PolarModel.from_pretrained(
            self.model,
            revision=self.revision,
            device=self.device,
            dtype=self.dtype,
            policy=self.policy,
            ledger=self.ledger,
            sink=self.sink,
        )

    def _options(self, call: Mapping[str, Any]) -> tuple[dict[str, Any], Deadline]:
        """Engine options of one call, and its deadline.

        Raises:
            TypeError: An option that does not exist, with the nearest that does.
        """
        _refuse_unknown(call, _PER_CALL, f"a call of {type(self).__name__}")
        options = {name: call.get(name, getattr(self, name)) for name in _ANSWERING}
        if call.get("compute") is not None and "program" not in call:
            options["program"] = None  # a program of the object must not outvote the tier of the call
        around = {key: str(value) for key, value in active_instrument_tags.get().items()}
        tenant = around.pop("tenant", None)
        own = self.tenant if self.engine is None or self.tenant != "default" else None
        deadline = Deadline(call.get("timeout", self.timeout))
        return {
            **options,
            "tenant": call.get("tenant") or tenant or own,
            "tags": {**self.usage_tags, **around, **(call.get("usage_tags") or {})},
            "request_id": call.get("request_id"),
            "cancel": deadline,
        }, deadline


def _refuse_unknown(given: Mapping[str, Any], known: Collection[str], whose: str) -> None:
    unknown = [name for name in given if name not in known]
    if not unknown:
        return
    if unknown[0] in ("tools", "tool_choice", "response_format"):
        raise NotImplementedError(f"{unknown[0]}= is not supported: this model writes text alone.")
    close: Sequence[str] = difflib.get_close_matches(unknown[0], sorted(known), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(sorted(known))}."
    raise TypeError(f"{unknown[0]!r} is no setting of {whose}; {hint}")
