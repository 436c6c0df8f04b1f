"""`get_polar_cost_callback`: what a block of LangChain calls cost, by model, tier, tag and tenant.

Reads what PoLar models write into their results and nothing else. It sees what LangChain shows to callbacks:
an interrupted answer, and one that `PolarLLM` took from a cache, never reach a callback. The ledger
has both.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.outputs import ChatGeneration, Generation, LLMResult
from langchain_core.tracers.context import register_configure_hook

from polar_sdk.frameworks.totals import CallCosts, CostTotals, PolarCall

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from uuid import UUID


__all__ = ["CallCosts", "CostTotals", "PolarCall", "PolarCostCallbackHandler", "get_polar_cost_callback"]


class PolarCostCallbackHandler(CallCosts, BaseCallbackHandler):
    """Collects the bill of every answer that LangChain reports to it. Safe to share between threads.

    Args:
        outer: Of a block around this one; it counts what this one counts.
    """

    def __init__(self, outer: PolarCostCallbackHandler | None = None) -> None:
        super().__init__()
        self._outer = outer
        self._runs: set[UUID] = set()
        """Runs that were counted: a run inside two blocks may report to both, and the inner one tells the outer."""

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **_: Any) -> None:
        """Take the bills from a result; results of other models hold none."""
        answers = [answer for row in response.generations for answer in row]
        calls = [call for answer in answers if (call := _bill(answer)) is not None]
        self._count(run_id, calls)

    def _count(self, run_id: UUID, calls: list[PolarCall]) -> None:
        with self._lock:
            again = run_id in self._runs
            self._runs.add(run_id)
        if not again:
            self.take(calls)
        if self._outer is not None:
            self._outer._count(run_id, calls)


def _bill(generation: object) -> PolarCall | None:
    if isinstance(generation, ChatGeneration):
        info: Mapping[str, Any] = generation.message.response_metadata
        usage: Mapping[str, Any] = getattr(generation.message, "usage_metadata", None) or {}
    elif isinstance(generation, Generation):
        info = generation.generation_info or {}
        usage = info.get("usage_metadata") or {}
    else:
        return None
    tokens = usage.get("input_tokens", 0), usage.get("output_tokens", 0)
    return PolarCall.of(info.get("model_name"), info, tokens)


_active: ContextVar[PolarCostCallbackHandler | None] = ContextVar("polar_cost_callback", default=None)
register_configure_hook(_active, inheritable=True)  # once: LangChain keeps every hook that is registered


@contextmanager
def get_polar_cost_callback() -> Iterator[PolarCostCallbackHandler]:
    """Collect the cost of every PoLar call in the block, however deep in a chain; blocks may be nested.

    Example:
        >>> with get_polar_cost_callback() as costs:  # doctest: +SKIP
        ...     chain.invoke({"question": "…"})
        >>> costs.total.cost, costs.by_tier["economy"].compute_units  # doctest: +SKIP
    """
    handler = PolarCostCallbackHandler(_active.get())
    token = _active.set(handler)
    try:
        yield handler
    finally:
        _active.reset(token)
