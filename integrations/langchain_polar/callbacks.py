"""`get_polar_cost_callback`: the cost of a block of LangChain calls, by model, tier, tag and tenant; `PolarTracer`.

Reads what PoLar models write into their results and nothing else. It sees what LangChain shows to callbacks:
an interrupted answer, and one that `PolarLLM` took from a cache, never reach a callback. The ledger
has both.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.outputs import ChatGeneration, Generation, LLMResult
from langchain_core.tracers.context import register_configure_hook
from langchain_core.tracers.langchain import LangChainTracer

from polar_sdk.frameworks.cost import CallCosts, CostTotals, PolarCall

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from uuid import UUID

    from langchain_core.tracers.schemas import Run


__all__ = ["CallCosts", "CostTotals", "PolarCall", "PolarCostCallbackHandler", "PolarTracer", "get_polar_cost_callback"]


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


# -- LangSmith ---------------------------------------------------------------------------------------------------------

_CURRENCY: Final = "USD"


class PolarTracer(LangChainTracer):
    """A `LangChainTracer` that adds `total_cost` to the usage of PoLar runs; other runs are traced as usual.

    Example:
        >>> chain.invoke("…", config={"callbacks": [PolarTracer()]})  # doctest: +SKIP

    LangSmith reads costs in dollars beside the tokens of a run. LangChain allows integers alone there, and its own
    counter breaks at anything else, so the cost is added to the copy that is sent, and not to the message. Costs in
    other currencies than US dollars are not added: LangSmith would show them as dollars.
    """

    def _on_llm_end(self, run: Run) -> None:
        for row in (run.outputs or {}).get("generations") or ():
            for answer in row:
                _price(answer, run)
        super()._on_llm_end(run)


def _price(answer: Mapping[str, Any], run: Run) -> None:
    message = (answer.get("message") or {}).get("kwargs") or {}
    if message:
        reported, usage = message.get("response_metadata") or {}, message.get("usage_metadata")
    else:
        reported = answer.get("generation_info") or {}
        usage = reported.get("usage_metadata")
    money = reported.get("cost_details") or {}
    if not usage or not reported.get("polar"):
        return
    if money.get("amount") is not None and money.get("currency") == _CURRENCY:
        usage["total_cost"] = float(money["amount"])
    if not message:  # LangChain looks for the usage of messages alone
        run.extra.setdefault("metadata", {})["usage_metadata"] = usage
