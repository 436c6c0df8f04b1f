"""`PolarTracer`: LangSmith's tracer, which also tells LangSmith what each answer cost.

LangSmith reads costs in dollars beside the tokens of a run. LangChain allows integers alone there, and its own counter
breaks at anything else, so that the cost is added to the copy that is sent, and not to the message. Knows no engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from langchain_core.tracers.langchain import LangChainTracer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from langchain_core.tracers.schemas import Run


_CURRENCY: Final = "USD"


class PolarTracer(LangChainTracer):
    """A `LangChainTracer` that adds `total_cost` to the usage of PoLar runs; other runs are traced as always.

    Example:
        >>> chain.invoke("…", config={"callbacks": [PolarTracer()]})  # doctest: +SKIP

    Costs in other currencies than US dollars are not added: LangSmith would show them as dollars.
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
