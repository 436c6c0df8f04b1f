"""What a vLLM server reports of its programs, if `VLLM_PLUGINS` names `polar`.

`GET /v1/polar/digests` is what a gateway compares with its own files before it sends requests, and
`GET /v1/polar/metrics` what the workers have executed, for Prometheus and `polar audit-upstream`. Every answer has the
header `polar-worker`: if it differs from that of the digests, the server was restarted since.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse

from polar_vllm.settings import KEY, Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER: Final = "polar-worker"
_TOKENS: Final = "polar_upstream_layer_tokens_total"
_RUNNING: Final = "polar_upstream_requests_running"


class Endpoint:
    """See `vllm.plugins.endpoint_plugins.interface`."""

    name = KEY
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the routes, and the header."""
        app.add_route("/v1/polar/digests", _digests)
        app.add_route("/v1/polar/metrics", _metrics)
        app.add_middleware(_Named)
        _tell_cached()

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep the engine and its digests, if it runs programs."""
        has_programs = engine_client is not None and Settings.of(engine_client.vllm_config).fills is not None
        state.polar = engine_client if has_programs else None
        state.polar_digests = await _asked(engine_client, "polar_digests") if has_programs else {}


class _Named:
    """Middleware that adds the header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def named(message: Message) -> None:
            if message["type"] == "http.response.start" and (own := scope["app"].state.polar_digests):
                MutableHeaders(scope=message)[HEADER] = own["worker"]
            await send(message)

        await self._app(scope, receive, named)


def _tell_cached() -> None:
    """Have every event of a stream say how many tokens of the prompt were cached, once.

    vLLM says so with the last one alone, without which a stream that is cut would be billed for what did not run.
    """
    from vllm.entrypoints.openai.completion import serving

    stock, usage = serving.OpenAIServingCompletion.completion_stream_generator, serving.UsageInfo
    if hasattr(stock, KEY):
        return
    cached: ContextVar[int | None] = ContextVar("cached", default=None)

    async def noted(results: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for place, result in results:
            cached.set(result.num_cached_tokens)
            yield place, result

    def stream(own: Any, request: Any, inputs: Any, results: Any, *args: Any, **options: Any) -> AsyncIterator[str]:
        events: AsyncIterator[str] = stock(own, request, inputs, noted(results), *args, **options)
        return events

    def with_cached(**fields: Any) -> Any:
        if (tokens := cached.get()) is not None:
            fields["prompt_tokens_details"] = serving.PromptTokenUsageInfo(cached_tokens=tokens)
        return usage(**fields)

    setattr(stream, KEY, True)
    serving.OpenAIServingCompletion.completion_stream_generator, serving.UsageInfo = stream, with_cached


async def _asked(engine: Any, method: str) -> Any:
    """The answer of the first worker: those of a tensor parallel group run the same tokens."""
    return (await engine.collective_rpc(method))[0]


async def _digests(request: Request) -> JSONResponse:
    return JSONResponse(request.app.state.polar_digests)


async def _metrics(request: Request) -> PlainTextResponse:
    state = request.app.state
    if state.polar is None:
        return PlainTextResponse("")
    sums, running = await _asked(state.polar, "polar_counts")
    worker = state.polar_digests["worker"]
    lines = [
        f"# HELP {_TOKENS} Tokens by layers; see polar_vllm.counts.",
        f"# TYPE {_TOKENS} counter",
        *(f'{_TOKENS}{{worker="{worker}",kind="{kind}"}} {value}' for kind, value in sums.items()),
        f"# HELP {_RUNNING} Requests that have begun and not ended.",
        f"# TYPE {_RUNNING} gauge",
        f'{_RUNNING}{{worker="{worker}"}} {running}',
    ]
    return PlainTextResponse("\n".join([*lines, ""]))
