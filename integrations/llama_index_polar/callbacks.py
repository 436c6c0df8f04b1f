"""`get_polar_cost_callback`: what a block of LlamaIndex calls cost, by model, tier, tag and tenant.

One handler listens to LlamaIndex's events, one at the end of every call, and passes them to the blocks that are open
where the call is made: a block follows its context into tasks, threads of LlamaIndex, agents and workflows. It sees
only what LlamaIndex reports: an interrupted answer has no such event. The ledger has it.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent, LLMCompletionEndEvent
from llama_index_instrumentation import get_dispatcher

from polar_sdk.frameworks.cost import CallCosts, CostTotals, PolarCall

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llama_index.core.instrumentation.events import BaseEvent


__all__ = ["CallCosts", "CostTotals", "PolarCall", "get_polar_cost_callback"]


class _Listener(BaseEventHandler):
    """Tells the open blocks of a context what a call cost; ignores events of other models and of wrappers."""

    @classmethod
    def class_name(cls) -> str:
        return "PolarCostListener"

    def handle(self, event: BaseEvent, **_: Any) -> None:
        if not isinstance(event, LLMChatEndEvent | LLMCompletionEndEvent) or not (open_blocks := _open.get()):
            return
        raw = getattr(event.response, "raw", None)
        if not isinstance(raw, dict):
            return
        usage = raw.get("usage") or {}
        tokens = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
        call = PolarCall.of(raw.get("model"), raw, tokens)
        if call is not None:
            for block in open_blocks:
                block.take([call])


_open: Final[ContextVar[tuple[CallCosts, ...]]] = ContextVar("polar_costs", default=())
_listener: Final = _Listener()
_adding: Final = threading.Lock()


def _listen() -> None:
    """Add the listener to LlamaIndex's root dispatcher, where it stays; again if somebody has emptied that one."""
    root = get_dispatcher()
    with _adding:
        if not any(handler is _listener for handler in root.event_handlers):
            root.add_event_handler(_listener)


@contextmanager
def get_polar_cost_callback() -> Iterator[CallCosts]:
    """Collect the cost of every PoLar call in the block, however deep in an engine or agent; blocks may be nested.

    Example:
        >>> with get_polar_cost_callback() as costs:  # doctest: +SKIP
        ...     query_engine.query("…")
        >>> costs.total.cost, costs.by_tier["economy"].compute_units  # doctest: +SKIP
    """
    _listen()
    block = CallCosts()
    token = _open.set((*_open.get(), block))
    try:
        yield block
    finally:
        _open.reset(token)
