"""Common parts of `PolarLLM` and `ChatPolar`: settings, the caller of a LangChain run, its call of the engine.

LangChain names the caller as `config={"metadata": …, "tags": …, "run_id": …}`; here that becomes tenant, tags and
request id. The engine records every request in its own `finally`, also if a stream is closed or a task is cancelled;
only a hit in LangChain's cache becomes a record here, which says that nothing was executed. Settings and the engine
that they load are in `polar_sdk.frameworks.settings`. Knows no messages and no callbacks.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

from langchain_core.runnables.config import ensure_config
from pydantic import Field, SecretStr

from langchain_polar._messages import UNKNOWN
from langchain_polar.errors import MAY_PASS, langchain_errors
from polar_sdk.errors import InvalidRequestError
from polar_sdk.frameworks.cost import cost_facts
from polar_sdk.frameworks.settings import ModelSettings
from polar_sdk.frameworks.telemetry import CallSpan
from polar_sdk.request.options import check_name, check_tags
from polar_sdk.sinks import find_sink
from polar_sdk.usage import Outcome, UsageRecord, flaw_of_name, flaw_of_text, new_request_id

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
    from uuid import UUID

    from langchain_core.callbacks.manager import BaseRunManager
    from langchain_core.language_models.base import LangSmithParams
    from langchain_core.runnables import Runnable, RunnableConfig

    from polar_sdk import Chunk, Generation, PolarModel
    from polar_sdk.request.options import Prompt, RequestOptions


_FRAMEWORK_KEYS: Final = ("ls_", "lc_", "langgraph_", "checkpoint_", "__")
"""Prefixes of metadata that frameworks add themselves: run bookkeeping, of no use on a bill."""
_FRAMEWORK_TAGS: Final = ("seq:step:", "map:key:", "branch:", "condition:", "graph:step:", "retry:attempt:")
_SAMPLING: Final = (
    *("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "logit_bias", "stop_repeats", "ignore_eos", "logprobs", "n"),
)
_SCALAR: Final = (str, int, float, bool)
MAX_ANSWERS: Final = 128
MAX_LABEL_LENGTH: Final = 200
"""Longer metadata values are payload, not labels. Unit: characters."""


@dataclass(frozen=True)
class Caller:
    """The caller of a request; if a field is None or empty, the model object's value applies."""

    tenant: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    request_id: str | None = None

    @classmethod
    def of_run(cls, manager: BaseRunManager | None) -> Caller:
        """Read LangChain's run manager; its run id becomes the request id, so traces and ledger meet."""
        return cls() if manager is None else cls.of(manager.metadata, manager.tags, manager.run_id)

    @classmethod
    def of(
        cls, metadata: Mapping[str, Any] | None, tags: Sequence[str] | None, run_id: UUID | str | None = None
    ) -> Caller:
        """Read the parts of a LangChain config.

        The metadata key `tenant` is the tenant; other short scalar values without control characters become tags under
        their own short key; LangChain's tags become one tag, `langchain_tags`, joined by commas.
        """
        named = (metadata or {}).get("tenant")
        tenant = str(named) if isinstance(named, _SCALAR) else named  # the engine refuses what is no name
        labels = {key: str(value) for key, value in (metadata or {}).items() if _is_label(key, value)}
        labels.pop("tenant", None)
        if names := [tag for tag in tags or () if not tag.startswith(_FRAMEWORK_TAGS) and flaw_of_text(tag) is None]:
            labels["langchain_tags"] = ",".join(dict.fromkeys(names))
        return cls(tenant, labels, None if run_id is None else str(run_id))

    def over(self, tenant: str, tags: Mapping[str, str]) -> Caller:
        """This caller, with tenant and tags of the engine where it names none."""
        return Caller(self.tenant or tenant, {**tags, **self.tags}, self.request_id)

    def as_options(self) -> RequestOptions:
        """The caller as options of the engine."""
        return {"tenant": self.tenant, "tags": self.tags, "request_id": self.request_id}

    def with_call(self, options: Mapping[str, Any]) -> Caller:
        """This caller, overridden by what the call itself names."""
        return Caller(
            options.get("tenant") or self.tenant,
            {**self.tags, **(options.get("usage_tags") or {})},
            options.get("request_id") or self.request_id,
        )

    def named(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a call, with this caller where they name none."""
        caller = self.with_call(options)
        return {**options, "tenant": caller.tenant, "usage_tags": caller.tags, "request_id": caller.request_id}


def _is_label(key: object, value: object) -> bool:
    if not isinstance(key, str) or key.startswith(_FRAMEWORK_KEYS) or not isinstance(value, _SCALAR):
        return False
    text = str(value)
    fits = all(part.strip() and len(part) <= MAX_LABEL_LENGTH for part in (key, text))
    return fits and flaw_of_name(key) is None and flaw_of_text(text) is None


def with_thread(config: RunnableConfig | None) -> RunnableConfig:
    """A config with its thread id among its metadata, which is all that LangChain tells a model of a config."""
    config = ensure_config(config)
    thread = (config.get("configurable") or {}).get("thread_id")
    about = config.get("metadata") or {}
    if thread is not None and "thread_id" not in about:
        config["metadata"] = {**about, "thread_id": str(thread)}
    return config


@dataclass(frozen=True)
class Call:
    """An engine, and the options of one call."""

    engine: PolarModel
    options: Mapping[str, Any]
    """Engine options that determine the answer."""
    caller: Caller
    tracing: bool = False
    """Whether OpenTelemetry's current span gets the answers' figures."""
    n: int = 1
    """Number of answers to each prompt."""

    def answers(self, prompts: Sequence[Prompt], callers: Sequence[Caller]) -> list[Generation]:
        """`n` answers to each of several prompts, those of one prompt together; all decode together."""
        with langchain_errors():
            span, (each_prompt, each) = CallSpan(self.tracing), self._repeated(prompts, callers)
            return [_noted(span, one) for one in self.engine.generate_batch(each_prompt, each=each, **self.options)]

    async def aanswers(self, prompts: Sequence[Prompt], callers: Sequence[Caller]) -> list[Generation]:
        """As `answers`, without blocking the event loop; a cancelled task stops every row within one pass."""
        with langchain_errors():
            span, (each_prompt, each) = CallSpan(self.tracing), self._repeated(prompts, callers)
            found = await self.engine.agenerate_batch(each_prompt, each=each, **self.options)
            return [_noted(span, one) for one in found]

    def _repeated(
        self, prompts: Sequence[Prompt], callers: Sequence[Caller]
    ) -> tuple[list[Prompt], list[RequestOptions]]:
        """Each prompt `n` times, and the options of each: the first answer has the caller's request id."""
        if not 1 <= self.n <= MAX_ANSWERS:
            raise InvalidRequestError(f"n={self.n} is out of range; use 1 to {MAX_ANSWERS}.")
        seed, each = self.options.get("seed"), []
        for caller in callers:
            for place in range(self.n):
                options = caller.as_options()
                if place:
                    options["request_id"] = None
                    if seed is not None:
                        options["seed"] = seed + place
                each.append(options)
        return [prompt for prompt in prompts for _ in range(self.n)], each

    def answer(self, prompt: Prompt) -> Generation:
        """Answer one prompt."""
        with langchain_errors():
            span = CallSpan(self.tracing)
            return _noted(span, self.engine.generate(prompt, **self._options()))

    async def aanswer(self, prompt: Prompt) -> Generation:
        """As `answer`, without blocking the event loop."""
        with langchain_errors():
            span = CallSpan(self.tracing)
            return _noted(span, await self.engine.agenerate(prompt, **self._options()))

    def stream(self, prompt: Prompt) -> Iterator[Chunk]:
        """Chunks as they come; closing this iterator closes the engine's, which ends the request."""
        with langchain_errors():
            span = CallSpan(self.tracing)
            with closing(self.engine.stream(prompt, **self._options())) as chunks:
                for chunk in chunks:
                    if chunk.generation is not None:
                        _noted(span, chunk.generation)
                    if chunk.text or chunk.generation is not None:
                        yield chunk

    async def astream(self, prompt: Prompt) -> AsyncIterator[Chunk]:
        """As `stream`, without blocking the event loop."""
        with langchain_errors():
            span = CallSpan(self.tracing)
            chunks = self.engine.astream(prompt, **self._options())
            async with aclosing(cast("AsyncGenerator[Chunk]", chunks)):
                async for chunk in chunks:
                    if chunk.generation is not None:
                        _noted(span, chunk.generation)
                    if chunk.text or chunk.generation is not None:
                        yield chunk

    def _options(self) -> dict[str, Any]:
        if self.n != 1:
            raise InvalidRequestError(f"n={self.n}: a stream has one answer; leave n= out, or do not stream.")
        return {**self.options, **self.caller.as_options()}


def _noted(span: CallSpan, generation: Generation) -> Generation:
    span.note(generation.usage, generation.receipt)
    return generation


class PolarBase(ModelSettings):
    """Settings of a PoLar model; those marked *per call* may also be passed to `invoke` and the like.

    `model` is per call too. `stop=` of a call replaces the object's. `tenant` may also be in a config's metadata;
    LangChain's own `tags` are for tracing, and are recorded beside `usage_tags`.
    """

    streaming: bool | None = None
    """True = `invoke` streams, so that callbacks see tokens; None = only `stream` does."""
    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)
    """Ignored: the model runs locally. Accepted so that code written for a hosted model runs unchanged."""
    max_retries: int | None = Field(default=None, exclude=True, repr=False)
    """Ignored: no network is involved, so the same request would fail the same way."""

    n: int = 1
    """Number of answers to one prompt, each metered, each with a seed one higher than the last. Per call."""

    per_call: ClassVar[frozenset[str]] = ModelSettings.per_call - {"stop"} | {"model", "n"}
    """`stop` is a parameter of its own."""
    dropped: ClassVar[frozenset[str]] = frozenset({"api_key", "max_retries", "stream"})
    """LangChain has acted on `stream` already."""

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """False: a sink cannot be written as JSON, and a copy without its sink would not be metered."""
        return False

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """All that an answer depends on; LangChain's caches and traces distinguish models by it."""
        return {
            "model": self.model_name,
            "model_fingerprint": None if self.engine is None else self.engine.fingerprint,
            "router": _router_setting(self.router) if self.engine is None else _router_name(self.engine),
            "policy": str(self.engine.policy if self.engine is not None else self.policy),
            "revision": self.revision,
            "precision": self.precision if self.engine is None else self.engine.dtype,
            "compute": self.compute,
            "program": None if self.program is None else str(self.program),
            **{name: getattr(self, name) for name in _SAMPLING},
            "default_stop": list(self.stop),
            "constraint": str([self.json_schema, self.regex, self.choice, self.grammar, self.fit_max_tokens]),
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params: LangSmithParams = super()._get_ls_params(stop=stop, **kwargs)  # type: ignore[misc]
        params["ls_provider"] = "polar"
        params["ls_model_name"] = kwargs.get("model") or self.model_name
        return params

    def with_retry(self, *, retry_if_exception_type: Any = MAY_PASS, **options: Any) -> Runnable[Any, Any]:
        """Like LangChain's, but by default it retries only errors that may be temporary.

        An exhausted budget, a prompt that is too long or a wrong option fails the same way each time.

        Args:
            retry_if_exception_type: Classes of errors, or in later versions of LangChain a function of one.
            **options: LangChain's other options, such as `stop_after_attempt`.
        """
        retried: Runnable[Any, Any] = super().with_retry(  # type: ignore[misc]
            retry_if_exception_type=retry_if_exception_type, **options
        )
        return retried

    if not TYPE_CHECKING:  # callers see LangChain's own signatures, which tell a model nothing of a config's thread

        def invoke(self, input, config=None, **options):
            return super().invoke(input, with_thread(config), **options)

        async def ainvoke(self, input, config=None, **options):
            return await super().ainvoke(input, with_thread(config), **options)

        def stream(self, input, config=None, **options):
            return super().stream(input, with_thread(config), **options)

        def astream(self, input, config=None, **options):
            return super().astream(input, with_thread(config), **options)

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
        return Call(bound._engine(), bound._engine_options(stop), self._caller(caller, options), bound.tracing, bound.n)

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
            span, record = CallSpan(self.tracing), _cached_record(metadata, caller, self.tenant)
            receipt = sink.emit(record)
            span.note(record, receipt)
            return {
                **metadata,
                **cost_facts(record, receipt),
            }  # what it cost this time, not what it cost when it was computed


def _router_setting(router: Any) -> str | None:
    """The configured router, by version or folder; None = whichever comes with the model."""
    return None if router is None else str(getattr(router, "version", router))


def _router_name(engine: PolarModel) -> str | None:
    router = engine.router
    return None if router is None else f"{router.kind} {router.version} {getattr(router, 'program', '')}".strip()


def _cached_record(metadata: Mapping[str, Any], caller: Caller, tenant: str) -> UsageRecord:
    """The record of an answer that LangChain took from its cache: no tokens, no visits, 0 FLOPs.

    Args:
        metadata: Response metadata of the cached answer.
        caller: Who got it this time.
        tenant: Used where the caller names none.

    Raises:
        TagError: A name that no request can have.
    """
    origin: Mapping[str, Any] = metadata.get("polar") or {}
    return UsageRecord(
        request_id=check_name("request_id", caller.request_id or new_request_id()),
        tenant=check_name("tenant", caller.tenant or tenant),
        tags=dict(check_tags(caller.tags)),
        model=metadata.get("model_name") or UNKNOWN,
        model_fingerprint=origin.get("model_fingerprint") or UNKNOWN,
        router=origin.get("router") or UNKNOWN,
        router_version=origin.get("router_version") or UNKNOWN,
        tier=origin.get("tier"),
        program="",
        outcome=Outcome.CACHED,
        finish_reason="cached",
        started_at=datetime.now(UTC),
    )
