"""Two routes of a vLLM server that runs programs, where `VLLM_PLUGINS` names `polar`.

`GET /v1/polar/digests` is what a gateway checks before it sends requests, and `GET /v1/polar/metrics` what the workers
have executed, for Prometheus.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, PlainTextResponse

from polar_vllm.settings import KEY, Settings

if TYPE_CHECKING:
    from starlette.requests import Request

_NAME = "polar_upstream_layer_tokens_total"


class Endpoint:
    """See `vllm.plugins.endpoint_plugins.interface`."""

    name = KEY
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the routes."""
        app.add_route("/v1/polar/digests", _digests)
        app.add_route("/v1/polar/metrics", _metrics)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep the engine, if it runs programs."""
        has_programs = engine_client is not None and Settings.of(engine_client.vllm_config).fills is not None
        state.polar = engine_client if has_programs else None


async def _asked(request: Request, method: str) -> Any:
    """Digests of the first worker: those of a tensor parallel group run the same tokens."""
    engine = request.app.state.polar
    return {} if engine is None else (await engine.collective_rpc(method))[0]


async def _digests(request: Request) -> JSONResponse:
    return JSONResponse(await _asked(request, "polar_digests"))


async def _metrics(request: Request) -> PlainTextResponse:
    sums = await _asked(request, "polar_counts")
    head = f"# HELP {_NAME} Tokens by layers; see polar_vllm.counts.\n# TYPE {_NAME} counter\n"
    return PlainTextResponse(head + "".join(f'{_NAME}{{kind="{kind}"}} {value}\n' for kind, value in sums.items()))
