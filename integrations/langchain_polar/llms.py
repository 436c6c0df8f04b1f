"""`PolarLLM`: text in, text out, as LangChain's `BaseLLM`.

Prompts of one call decode together, each with its own usage in `generation_info`; the sums are in `llm_output`. For
messages, and for LangChain's own usage callback, use `ChatPolar`.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_core.runnables.config import get_config_list

from langchain_polar._base import Caller, PolarBase, with_thread
from langchain_polar._messages import response_metadata, totals, usage_metadata
from polar_sdk.frameworks.settings import CALLER_OPTIONS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.runnables import RunnableConfig

    import polar_sdk
    from langchain_polar._base import Call


class PolarLLM(PolarBase, BaseLLM):
    """A local LLM that runs a program of layers per prompt, completes text and is metered.

    Example:
        >>> from langchain_polar import PolarLLM
        >>> PolarLLM().invoke("What is the capital of France?")  # doctest: +SKIP
        'The capital of France is Paris.'

    `generation_info` of each generation contains `usage_metadata`, `cost`, `cost_details` and `polar` (program, FLOPs,
    tier, …); on streams, that of the last chunk. An answer from LangChain's cache is recorded as `outcome=cached` with
    0 FLOPs.
    """

    template: Literal["auto", "chat", "raw"] = "auto"
    """`auto`: the prompt becomes a user message if the model has a chat template; `raw`: it is completed unchanged,
    special tokens in it recognised. Per call."""

    per_call: ClassVar[frozenset[str]] = PolarBase.per_call | {"template"}

    @property
    def _llm_type(self) -> str:
        return "polar"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {**super()._identifying_params, "template": self.template}

    def _engine_options(self, stop: Sequence[str] | None) -> dict[str, Any]:
        return {**super()._engine_options(stop), "template": self.template}

    # --- LangChain's public entry points, for what it omits: it tells a model nothing of the run ids of a batch; its
    # --- cache key ignores the options of a call, and a hit in its cache reaches no callback.

    if not TYPE_CHECKING:  # callers see LangChain's own signatures

        def batch(self, inputs, config=None, **options):  # noqa: D102
            configs = [with_thread(one) for one in get_config_list(config, len(inputs))]
            return super().batch(inputs, configs, **_run_ids(configs), **options)

        async def abatch(self, inputs, config=None, **options):  # noqa: D102
            configs = [with_thread(one) for one in get_config_list(config, len(inputs))]
            return await super().abatch(inputs, configs, **_run_ids(configs), **options)

        def generate(  # noqa: D102
            self, prompts, stop=None, callbacks=None, *, tags=None, metadata=None, run_name=None, run_id=None, **options
        ):
            bound, who = self._bind(options)
            run = {"tags": tags, "metadata": metadata, "run_name": run_name, "run_id": run_id}
            result = super(PolarLLM, bound).generate(prompts, stop, callbacks, **run, **who)
            return bound._settle_hits(result, bound._callers(len(prompts), metadata, tags), who)

        async def agenerate(  # noqa: D102
            self, prompts, stop=None, callbacks=None, *, tags=None, metadata=None, run_name=None, run_id=None, **options
        ):
            bound, who = self._bind(options)
            run = {"tags": tags, "metadata": metadata, "run_name": run_name, "run_id": run_id}
            result = await super(PolarLLM, bound).agenerate(prompts, stop, callbacks, **run, **who)
            callers = bound._callers(len(prompts), metadata, tags)
            return await asyncio.to_thread(bound._settle_hits, result, callers, who)

    def _bind(self, options: Mapping[str, Any]) -> tuple[PolarLLM, dict[str, Any]]:
        """A copy with the options that change the answer as settings, and the options that only name the caller."""
        return self._with_options(options), {name: options[name] for name in CALLER_OPTIONS if name in options}

    def _settle_hits(self, result: LLMResult, callers: Sequence[Caller], options: Mapping[str, Any]) -> LLMResult:
        """Give every generation that this call did not compute its own record and price."""
        computed = set((result.llm_output or {}).get("request_ids", ()))
        rows = result.generations
        for index, row in enumerate(rows):
            info = row[0].generation_info or {}
            if (info.get("polar") or {}).get("request_id") not in computed:
                caller, own = self._caller(callers[index], options), list[Generation]()
                for one in row:
                    settled = self._settle_cached(one.generation_info or {}, caller)
                    own.append(Generation(text=one.text, generation_info=settled))
                    caller = replace(caller, request_id=None)
                rows[index] = [*own]
        return result

    def _callers(
        self,
        count: int,
        metadata: dict[str, Any] | list[dict[str, Any]] | None,
        tags: list[str] | list[list[str]] | None,
    ) -> list[Caller]:
        """The caller of each prompt, from what `generate` takes once for all or once per prompt."""
        each_metadata = metadata if isinstance(metadata, list) else [metadata] * count
        each_tags: Sequence[Any] = tags if tags and isinstance(tags[0], list) else [tags] * count
        return [
            Caller.of({**(self.metadata or {}), **(about or {})}, [*(names or ()), *(self.tags or ())])
            for about, names in zip(each_metadata, each_tags, strict=True)
        ]

    # --- What LangChain calls. ---

    def _generate_helper(
        self,
        prompts: list[str],
        stop: list[str] | None,
        run_managers: list[CallbackManagerForLLMRun],
        **kwargs: Any,
    ) -> LLMResult:
        """Pass on the run of every prompt: LangChain itself passes only the first one to `_generate`."""
        callers = [Caller.of_run(manager) for manager in run_managers]
        return super()._generate_helper(prompts, stop, run_managers, callers=callers, **kwargs)

    async def _agenerate_helper(
        self,
        prompts: list[str],
        stop: list[str] | None,
        run_managers: list[AsyncCallbackManagerForLLMRun],
        **kwargs: Any,
    ) -> LLMResult:
        callers = [Caller.of_run(manager) for manager in run_managers]
        return await super()._agenerate_helper(prompts, stop, run_managers, callers=callers, **kwargs)

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        callers: Sequence[Caller] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        call = self._call(kwargs, stop, Caller.of_run(run_manager))
        if self.streaming and len(prompts) == 1:
            return _result(call, [_streamed(call, prompts[0], run_manager)])
        return _result(call, call.answers(prompts, self._each(prompts, call, callers, kwargs)))

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        callers: Sequence[Caller] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        call = await self._acall(kwargs, stop, Caller.of_run(run_manager))
        if self.streaming and len(prompts) == 1:
            return _result(call, [await _astreamed(call, prompts[0], run_manager)])
        return _result(call, await call.aanswers(prompts, self._each(prompts, call, callers, kwargs)))

    def _each(
        self, prompts: Sequence[str], call: Call, callers: Sequence[Caller] | None, options: Mapping[str, Any]
    ) -> list[Caller]:
        """The caller of each prompt."""
        if callers is None:
            return [call.caller] * len(prompts)
        return [self._caller(caller, options) for caller in callers]

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        call = self._call(kwargs, stop, Caller.of_run(run_manager))
        for chunk in call.stream(prompt):
            piece = _piece(call, chunk)
            if run_manager is not None:
                run_manager.on_llm_new_token(piece.text, chunk=piece)
            yield piece

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        call = await self._acall(kwargs, stop, Caller.of_run(run_manager))
        async for chunk in call.astream(prompt):
            piece = _piece(call, chunk)
            if run_manager is not None:
                await run_manager.on_llm_new_token(piece.text, chunk=piece)
            yield piece


def _run_ids(configs: Sequence[RunnableConfig]) -> dict[str, Any]:
    """The run ids of a batch; none where LangChain divides it by `max_concurrency`, and comes back with each part."""
    divided = bool(configs) and configs[0].get("max_concurrency") is not None
    return {} if divided else {"run_id": [one.get("run_id") for one in configs]}


def _result(call: Call, generations: Sequence[polar_sdk.Generation]) -> LLMResult:
    listed = [Generation(text=answer.text, generation_info=_info(call, answer)) for answer in generations]
    rows = [listed[start : start + call.n] for start in range(0, len(listed), call.n)]
    return LLMResult(generations=rows, llm_output=totals(generations))


def _info(call: Call, generation: polar_sdk.Generation) -> dict[str, Any]:
    return {
        **response_metadata(generation, call.engine.decode),
        "usage_metadata": usage_metadata(generation.usage),
    }


def _piece(call: Call, chunk: polar_sdk.Chunk) -> GenerationChunk:
    info = None if chunk.generation is None else _info(call, chunk.generation)
    return GenerationChunk(text=chunk.text, generation_info=info)


def _streamed(call: Call, prompt: str, run_manager: CallbackManagerForLLMRun | None) -> polar_sdk.Generation:
    """Run a stream to its end for `streaming=True`, reporting tokens to callbacks."""
    last = None
    for chunk in call.stream(prompt):
        last = chunk.generation
        if run_manager is not None:
            run_manager.on_llm_new_token(chunk.text, chunk=_piece(call, chunk))
    assert last is not None, "the engine's last chunk carries the generation"
    return last


async def _astreamed(
    call: Call, prompt: str, run_manager: AsyncCallbackManagerForLLMRun | None
) -> polar_sdk.Generation:
    last = None
    async for chunk in call.astream(prompt):
        last = chunk.generation
        if run_manager is not None:
            await run_manager.on_llm_new_token(chunk.text, chunk=_piece(call, chunk))
    assert last is not None, "the engine's last chunk carries the generation"
    return last
