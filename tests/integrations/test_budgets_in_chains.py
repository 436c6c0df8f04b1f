"""Budgets in chains, agents and workflows, against a real ledger: who is stopped, who goes on, and who is told what."""

from __future__ import annotations

import pickle
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ModelFallbackMiddleware, ModelRetryMiddleware
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import ModelError, ModelRateLimitError
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import RetryPolicy
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.tools import FunctionTool

import llama_index_polar
from langchain_polar import ChatPolar, PolarLLM, get_polar_cost_callback
from langchain_polar.errors import langchain_errors
from polar_sdk.errors import BudgetExceededError, QueueFullError
from polar_sdk.frameworks.tools import call_text
from polar_sdk.testing import scripted_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polar_sdk import PolarModel

billing: Any = pytest.importorskip("polar_billing")
BOTH = pytest.mark.parametrize("kind", [PolarLLM, ChatPolar])
CALL = call_text("weather", {"city": "Köln"})
ASK = {"messages": [HumanMessage("Weather in Köln?")]}
MOST = 60


def weather(city: str) -> str:
    """Tell the weather."""
    return f"sunny in {city}"


class _Starts(BaseCallbackHandler):
    """Counts how often a model is asked."""

    def __init__(self) -> None:
        self.count = 0

    def on_chat_model_start(self, *_: Any, **__: Any) -> None:
        self.count += 1


@pytest.fixture
def engine() -> PolarModel:
    """A model that calls its tool for ever, metered into the ledger of the test."""
    return scripted_model(lambda _: CALL, context_window=4096, ledger="auto")


@pytest.fixture
def budgets() -> Iterator[Any]:
    with billing.Ledger() as ledger:
        yield billing.Budgets(ledger)


@pytest.fixture
def exhausted(budgets: Any) -> None:
    budgets.set(billing.Budget("acme", Decimal(0)))


def _stored(budgets: Any, tenant: str = "acme") -> list[Any]:
    return list(budgets.ledger.read(billing.Selection(tenant)))


def _one_step(engine: PolarModel, compute: str = "premium") -> Decimal:
    """Compute of the agent's first step. Unit: CU."""
    chat = ChatPolar(engine=engine, max_tokens=MOST, tenant="probe", compute=compute).bind_tools([weather])
    return Decimal(chat.invoke("Weather in Köln?").response_metadata["polar"]["flops"]).scaleb(-12)


async def _run(agent: Any, way: str, config: Any = None) -> None:
    if way == "invoke":
        agent.invoke(ASK, config)
    elif way == "stream":
        list(agent.stream(ASK, config, stream_mode="messages"))
    else:
        await agent.ainvoke(ASK, config)


# --- LangChain and LangGraph. ---


@pytest.mark.parametrize("way", ["invoke", "stream", "ainvoke"])
async def test_an_agent_that_loops_is_stopped_by_its_budget(engine: PolarModel, budgets: Any, way: str) -> None:
    limit = 4 * _one_step(engine)
    budgets.set(billing.Budget("acme", limit))
    agent: Any = create_agent(ChatPolar(engine=engine, max_tokens=MOST, tenant="acme", compute="premium"), [weather])
    with get_polar_cost_callback() as costs, pytest.raises(BudgetExceededError) as caught:
        await _run(agent, way)
    error, stored = caught.value, _stored(budgets)
    assert isinstance(error, ModelRateLimitError)
    assert error.is_retryable is False
    assert stored
    spent = sum(Decimal(usage.record.flops.total).scaleb(-12) for usage in stored)
    assert Decimal(error.spent or 0) == spent == costs.total.compute_units
    assert Decimal(error.remaining or 0) == limit - spent < Decimal(error.needed or 0)
    assert f"({error.spent} CU spent, 0 CU held)" in str(error)
    assert budgets.holds("acme") == []


@pytest.mark.parametrize(("compute", "steps"), [("premium", "3.5"), (None, "3.75")])
def test_an_agent_goes_shallower_before_it_is_stopped(
    engine: PolarModel, budgets: Any, compute: str | None, steps: str
) -> None:
    limit = Decimal(steps) * _one_step(engine)
    budgets.set(billing.Budget("acme", limit, over_budget=billing.OverBudget.SHALLOWER))
    agent: Any = create_agent(ChatPolar(engine=engine, max_tokens=MOST, tenant="acme", compute=compute), [weather])
    with pytest.raises(BudgetExceededError):
        agent.invoke(ASK)
    tiers = [usage.record.tier for usage in _stored(budgets)]
    order = ["premium", "standard", "economy"]
    assert tiers[0] == (compute or "standard")
    assert tiers == sorted(tiers, key=order.index)
    assert tiers[-1] == "economy"


def test_a_shallower_answer_says_so(engine: PolarModel, budgets: Any) -> None:
    chat = ChatPolar(engine=engine, max_tokens=MOST, tenant="acme", compute="premium").bind_tools([weather])
    limit = _one_step(engine) - Decimal("1E-12")
    budgets.set(billing.Budget("acme", limit, over_budget="shallower"))
    reported = chat.invoke("Weather in Köln?").response_metadata["polar"]
    assert reported["tier"] in ("standard", "economy")
    assert reported["tags"]["polar.downgraded_from"] == "premium"


@pytest.mark.usefixtures("exhausted")
def test_nobody_retries_an_exhausted_budget_unasked(engine: PolarModel, budgets: Any) -> None:
    chat, starts = ChatPolar(engine=engine, max_tokens=2, tenant="acme"), _Starts()
    config: Any = {"callbacks": [starts]}
    graph = StateGraph(MessagesState)
    graph.add_node(
        "model",
        lambda state, config: {"messages": [chat.invoke(state["messages"], config)]},
        retry_policy=RetryPolicy(max_attempts=5),
    )
    graph.add_edge(START, "model")
    graph.add_edge("model", END)
    ways: list[Any] = [
        (chat.with_retry(), "Hello"),
        (chat.bind_tools([weather]).with_retry(stop_after_attempt=5), "Hello"),
        (create_agent(chat, [weather], middleware=[ModelRetryMiddleware(max_retries=5)]), ASK),
        (graph.compile(), ASK),
    ]
    for count, (runnable, question) in enumerate(ways, 1):
        with pytest.raises(BudgetExceededError):
            runnable.invoke(question, config)
        assert starts.count == count
    assert _stored(budgets) == []


@pytest.mark.usefixtures("exhausted")
def test_a_user_may_have_it_retried_and_it_ends(engine: PolarModel) -> None:
    chat, starts = ChatPolar(engine=engine, max_tokens=2, tenant="acme"), _Starts()
    retried = chat.with_retry(
        retry_if_exception_type=(BudgetExceededError,), wait_exponential_jitter=False, stop_after_attempt=4
    )
    with pytest.raises(BudgetExceededError):
        retried.invoke("Hello", {"callbacks": [starts]})
    assert starts.count == 4
    chain = (chat | StrOutputParser()).with_retry(wait_exponential_jitter=False)  # LangChain retries any error of these
    with pytest.raises(BudgetExceededError):
        chain.invoke("Hello", {"callbacks": [starts]})
    assert starts.count == 4 + 3


def test_what_may_pass_is_retried_by_default(engine: PolarModel) -> None:
    starts = _Starts()
    chat = ChatPolar(engine=engine, max_tokens=2, timeout=1e-9).with_retry(wait_exponential_jitter=False)
    with pytest.raises(TimeoutError):
        chat.invoke("Hello", {"callbacks": [starts]})
    assert starts.count == 3


@BOTH
@pytest.mark.usefixtures("exhausted")
async def test_a_fallback_answers_on_its_own_budget(kind: Any, engine: PolarModel, budgets: Any) -> None:
    options: dict[str, Any] = {"engine": engine, "max_tokens": 4}
    first, second = kind(**options, tenant="acme"), kind(**options, tenant="house")
    model = first.with_fallbacks([second], exceptions_to_handle=(ModelRateLimitError,))
    model.invoke("Hello")
    await model.ainvoke("Hello")
    list(model.stream("Hello"))
    _ = [piece async for piece in model.astream("Hello")]
    assert len(model.batch(["Hello", "Hey"])) == 2
    assert _stored(budgets) == []
    assert [usage.record.outcome for usage in _stored(budgets, "house")] == ["completed"] * 6
    with pytest.raises(BudgetExceededError):
        first.with_fallbacks([second], exceptions_to_handle=(TimeoutError,)).invoke("Hello")


@pytest.mark.usefixtures("exhausted")
def test_a_fallback_middleware_answers_on_its_own_budget(budgets: Any) -> None:
    engine = scripted_model(lambda _: "Sunny.", context_window=2048, ledger="auto")
    fallback = ModelFallbackMiddleware(ChatPolar(engine=engine, max_tokens=20, tenant="house"))
    chat = ChatPolar(engine=engine, max_tokens=20, tenant="acme")
    agent: Any = create_agent(chat, [weather], middleware=[fallback])
    assert agent.invoke(ASK)["messages"][-1].text == "Sunny."
    assert len(_stored(budgets, "house")) == 1


@BOTH
@pytest.mark.usefixtures("exhausted")
async def test_every_way_of_asking_raises_both_families(kind: Any, engine: PolarModel) -> None:
    model = kind(engine=engine, max_tokens=4, tenant="acme")
    for family in (BudgetExceededError, ModelRateLimitError, RuntimeError):
        with pytest.raises(family):
            model.invoke("Hello")
    with pytest.raises(ModelRateLimitError):
        await model.ainvoke("Hello")
    with pytest.raises(ModelRateLimitError):
        list(model.stream("Hello"))
    with pytest.raises(ModelRateLimitError):
        async for _ in model.astream("Hello"):
            pass
    for answer in model.batch(["a", "b"], return_exceptions=True):
        assert isinstance(answer, BudgetExceededError)
        assert (answer.level, answer.name, answer.spent, answer.limit) == ("tenant", "acme", "0", "0")
        again = pickle.loads(pickle.dumps(answer))
        assert (type(again), again.spent, again.is_retryable) == (type(answer), "0", False)


def test_a_full_queue_may_pass() -> None:
    with pytest.raises(ModelError) as caught, langchain_errors():
        raise QueueFullError("256 requests are waiting.")
    assert caught.value.is_retryable


# --- LlamaIndex. It has no errors of its own for models; ours passes through as it is. ---


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LlamaIndex's workflows
async def test_a_workflow_agent_that_loops_is_stopped_by_its_budget(engine: PolarModel, budgets: Any) -> None:
    llm = llama_index_polar.PolarLLM(engine=engine, max_tokens=MOST, tenant="acme", compute="premium")
    tool = FunctionTool.from_defaults(weather)
    probe: Any = llm.chat_with_tools([tool], "Weather in Köln?", tenant="probe").raw
    limit = 4 * Decimal(probe["cost_details"]["amount"])
    budgets.set(billing.Budget("acme", limit, unit="USD"))
    agent = FunctionAgent(tools=[tool], llm=llm)
    with llama_index_polar.get_polar_cost_callback() as costs, pytest.raises(BudgetExceededError) as caught:
        await agent.run("Weather in Köln?", max_iterations=100)
    stored = _stored(budgets)
    assert stored
    spent = sum(usage.cost for usage in stored)
    assert Decimal(caught.value.spent or 0) == spent
    assert costs.total.cost == {"USD": spent}
    assert f"({caught.value.spent} USD spent" in str(caught.value)
    assert budgets.holds("acme") == []


@pytest.mark.usefixtures("exhausted")
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # LlamaIndex's thread raises it, too
async def test_engines_of_llama_index_raise_it_also_from_their_threads(engine: PolarModel) -> None:
    llm = llama_index_polar.PolarLLM(engine=engine, max_tokens=4, tenant="acme")
    chat = SimpleChatEngine.from_defaults(llm=llm, memory=ChatMemoryBuffer.from_defaults(llm=llm))
    with pytest.raises(BudgetExceededError):
        chat.chat("Hello")
    with pytest.raises(BudgetExceededError):
        await chat.achat("Hello")
    with pytest.raises(BudgetExceededError):
        list(chat.stream_chat("Hello").response_gen)
