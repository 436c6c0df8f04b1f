"""What `PolarLLM` and `ChatPolar` share: LangChain's settings, options of a call, cache keys, cache hits.

Settings and the engine that they load are `polar_sdk.frameworks.settings`. Knows no messages and no callbacks.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, SecretStr

from langchain_polar._calls import Call, Caller
from langchain_polar._messages import cached_metadata, cached_record
from langchain_polar.errors import MAY_PASS, langchain_errors
from polar_sdk.frameworks.settings import ModelSettings
from polar_sdk.frameworks.tracing import CallSpan
from polar_sdk.sinks import find_sink

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from langchain_core.language_models.base import LangSmithParams
    from langchain_core.runnables import Runnable

    from polar_sdk import PolarModel


class PolarBase(ModelSettings):
    """Settings of a PoLar model; those marked *per call* may also be passed to `invoke` and the like.

    `model` is per call too. `stop=` of a call replaces the object's. `tenant` may also be in a config's metadata;
    LangChain's own `tags` are for tracing, and are recorded beside `usage_tags`.
    """

    streaming: bool | None = None
    """True = `invoke` streams, so that callbacks see tokens; None = only `stream` does."""
    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)
    """Ignored: the model runs here. Accepted so that code written for a hosted model runs unchanged."""
    max_retries: int | None = Field(default=None, exclude=True, repr=False)
    """Ignored: no network is involved, so the same request would fail the same way."""

    per_call: ClassVar[frozenset[str]] = ModelSettings.per_call - {"stop"} | {"model"}
    """`stop` is a parameter of its own."""
    dropped: ClassVar[frozenset[str]] = frozenset({"api_key", "max_retries", "stream"})
    """LangChain has acted on `stream` already."""

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """False: a sink cannot be written as JSON, and a copy without its sink would not be metered."""
        return False

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """All that an answer depends on: LangChain's caches and traces tell models apart by it."""
        return {
            "model": self.model_name,
            "model_fingerprint": None if self.engine is None else self.engine.fingerprint,
            "router": _router_setting(self.router) if self.engine is None else _router_name(self.engine),
            "policy": str(self.engine.policy if self.engine is not None else self.policy),
            "revision": self.revision,
            "precision": self.precision if self.engine is None else self.engine.dtype,
            "compute": self.compute,
            "program": None if self.program is None else str(self.program),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "default_stop": list(self.stop),
            "constraint": str([self.json_schema, self.regex, self.choice, self.grammar, self.fit_max_tokens]),
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params: LangSmithParams = super()._get_ls_params(stop=stop, **kwargs)  # type: ignore[misc]
        params["ls_provider"] = "polar"
        params["ls_model_name"] = kwargs.get("model") or self.model_name
        return params

    def with_retry(self, *, retry_if_exception_type: Any = MAY_PASS, **options: Any) -> Runnable[Any, Any]:
        """As LangChain's, but unless you say otherwise only what may pass by itself is tried again.

        An exhausted budget, a prompt that is too long or a wrong option fails the same way each time.

        Args:
            retry_if_exception_type: Classes of errors, or in later versions of LangChain a function of one.
            **options: LangChain's others, such as `stop_after_attempt`.
        """
        retried: Runnable[Any, Any] = super().with_retry(  # type: ignore[misc]
            retry_if_exception_type=retry_if_exception_type, **options
        )
        return retried

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of a plain text, by the model's own tokenizer."""
        own = getattr(self, "custom_get_token_ids", None)
        return list(own(text)) if own is not None else self._engine().encode(text)

    def _engine(self) -> PolarModel:
        with langchain_errors():
            return super()._engine()

    def _call(self, options: Mapping[str, Any], stop: Sequence[str] | None, caller: Caller) -> Call:
        """Prepare one call of the engine; loads it if needed."""
        bound = self._with_options(options)
        return Call(bound._engine(), bound._engine_options(stop), self._caller(caller, options), bound.tracing)

    async def _acall(self, options: Mapping[str, Any], stop: Sequence[str] | None, caller: Caller) -> Call:
        """As `_call`; loading weights does not block the event loop."""
        return await asyncio.to_thread(self._call, options, stop, caller)

    def _engine_options(self, stop: Sequence[str] | None) -> dict[str, Any]:
        return self._answer_options() if stop is None else {**self._answer_options(), "stop": stop}

    def _caller(self, caller: Caller, options: Mapping[str, Any]) -> Caller:
        """The call overrides the config, which overrides the object, which overrides a given engine."""
        named = caller.with_call(options)
        return Caller(named.tenant or self._own_tenant, {**self.usage_tags, **named.tags}, named.request_id)

    def _settle_cached(self, metadata: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """Record that LangChain answered from its cache, and return the metadata that says so."""
        with langchain_errors():
            engine = self._engines.get(self.model, self.engine)
            if engine is None:  # answered by a cache on disk before any weights were loaded
                sink = find_sink(self.ledger, self.sink)
            else:
                sink, caller = engine.sink, caller.over(engine.tenant, engine.tags)
            span, record = CallSpan(self.tracing), cached_record(metadata, caller, self.tenant)
            receipt = sink.emit(record)
            span.note(record, receipt)
            return cached_metadata(metadata, record, receipt)


def _router_setting(router: Any) -> str | None:
    """The configured router, by version or folder; None = whichever comes with the model."""
    return None if router is None else str(getattr(router, "version", router))


def _router_name(engine: PolarModel) -> str | None:
    router = engine.router
    return None if router is None else f"{router.kind} {router.version} {getattr(router, 'program', '')}".strip()
