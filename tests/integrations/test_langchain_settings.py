"""Settings and options of the LangChain models: what is refused, what acts, what tells two models apart."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import typer.main
from langchain_core import exceptions as langchain
from langchain_core.messages import HumanMessage
from langchain_core.runnables import ConfigurableField

from langchain_polar import ChatPolar, PolarLLM
from langchain_polar.errors import langchain_errors
from llama_index_polar import PolarLLM as LlamaIndexLLM
from polar_sdk import ListSink, Program
from polar_sdk import errors as polar
from polar_sdk.cli.main import app
from polar_sdk.frameworks.options import INSTEAD, OPTIONS
from polar_sdk.frameworks.settings import CALLER_OPTIONS
from polar_sdk.request.options import RequestOptions
from polar_sdk.testing import tiny_model

if TYPE_CHECKING:
    from polar_sdk import PolarModel

BOTH = pytest.mark.parametrize("kind", [PolarLLM, ChatPolar])


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else str(answer.content)


@BOTH
def test_a_misspelt_setting_or_option_names_the_nearest(kind: Any, engine: PolarModel, sink: ListSink) -> None:
    with pytest.raises(TypeError, match="'temperature'"):
        kind(temprature=0.5)
    with pytest.raises(TypeError, match="'max_tokens'"):
        kind(engine=engine).invoke("Hello", max_token=3)
    with pytest.raises(TypeError, match="'compute'"):
        list(kind(engine=engine).stream("Hello", comput="economy"))
    assert sink.records == []


@BOTH
def test_settings_of_hosted_models_are_taken_and_change_nothing(kind: Any, engine: PolarModel) -> None:
    model = kind(engine=engine, max_tokens=4, api_key="secret", max_retries=2)
    assert _text(model.invoke("Hello")) == _text(kind(engine=engine, max_tokens=4).invoke("Hello"))
    assert "secret" not in repr(model)


@BOTH
@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 3},
        {"compute": "economy"},
        {"program": "0 2-5"},
        {"temperature": 1.5, "seed": 3},
    ],
)
def test_an_option_of_a_call_acts_as_the_setting_does(kind: Any, engine: PolarModel, options: Any) -> None:
    plain = {"engine": engine, "max_tokens": 10, "compute": "premium"}
    per_call = kind(**plain).invoke("Hello", **options)
    set_once = kind(**{**plain, **options}).invoke("Hello")
    assert _text(per_call) == _text(set_once)
    assert _text(per_call) != _text(kind(**plain).invoke("Hello"))
    assert "".join(_text(piece) for piece in kind(**plain).stream("Hello", **options)) == _text(set_once)


@BOTH
def test_stop_ends_the_answer_and_a_calls_own_replaces_it(kind: Any, engine: PolarModel) -> None:
    model = kind(engine=engine, max_tokens=10)
    whole = _text(model.invoke("Hello"))
    early, late = sorted(set(whole), key=whole.index)[1:3]
    before_early, before_late = whole.partition(early)[0], whole.partition(late)[0]
    assert _text(model.invoke("Hello", stop=[early])) == before_early
    stopped = kind(engine=engine, max_tokens=10, stop=early)
    assert _text(stopped.invoke("Hello")) == before_early
    assert "".join(_text(piece) for piece in stopped.stream("Hello")) == before_early
    assert _text(stopped.invoke("Hello", stop=[late])) == before_late


@BOTH
def test_a_tier_of_the_call_outvotes_a_program_of_the_object(kind: Any, engine: PolarModel, sink: ListSink) -> None:
    kind(engine=engine, max_tokens=1, program="0-5").invoke("Hello", compute="economy")
    assert (sink.records[0].tier, sink.records[0].program) == ("economy", "0 3-5")


@BOTH
def test_identifying_params_tell_models_apart(kind: Any, engine: PolarModel) -> None:
    base = kind(engine=engine)._identifying_params
    changes: list[dict[str, Any]] = [
        {"temperature": 0.5},
        {"seed": 1},
        {"compute": "economy"},
        {"program": Program.parse("0-5")},
        {"max_tokens": 3},
        {"stop": "x"},
        {"top_k": 4},
        {"top_p": 0.5},
        {"engine": tiny_model(seed=1)},
    ]
    keys = [str(kind(**{"engine": engine, **change})._identifying_params) for change in changes]
    assert len({str(base), *keys}) == len(changes) + 1
    assert str(kind(engine=engine, tenant="acme")._identifying_params) == str(base)


@BOTH
def test_fields_can_be_configured_per_run(kind: Any, engine: PolarModel, sink: ListSink) -> None:
    model = kind(engine=engine, max_tokens=2).configurable_fields(compute=ConfigurableField(id="tier"))
    model.invoke("Hello", config={"configurable": {"tier": "economy"}})
    pieces = list(model.stream("Hello", config={"configurable": {"tier": "premium"}}))
    assert [record.tier for record in sink.records] == ["economy", "premium"]
    assert len(pieces) > 1


@BOTH
def test_an_engine_brings_its_own_settings(kind: Any, engine: PolarModel) -> None:
    with pytest.raises(ValueError, match="sink"):
        kind(engine=engine, sink=ListSink())
    with pytest.raises(ValueError, match="model"):
        kind(engine=engine, model="some/model")
    with pytest.raises(ValueError, match="PolarModel"):
        kind(engine="tiny")


@pytest.mark.parametrize("kind", [PolarLLM, ChatPolar, LlamaIndexLLM])
def test_a_deep_copy_has_settings_of_its_own_and_the_same_engine_and_sink(
    kind: Any, engine: PolarModel, sink: ListSink
) -> None:
    model = kind(engine=engine, max_tokens=1, usage_tags={"a": "b"})
    again = copy.deepcopy(model)
    again.usage_tags["a"] = "c"
    for one in (model, again):
        one.invoke("Hello") if hasattr(one, "invoke") else one.complete("Hello")
    assert [record.tags for record in sink.records] == [{"a": "b"}, {"a": "c"}]


@BOTH
def test_an_engine_at_hand_wins_over_the_environment(
    kind: Any, engine: PolarModel, sink: ListSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLAR_MODEL", "some/model")
    assert kind().model_name == "some/model"
    kind(engine=engine, max_tokens=1).invoke("Hello")
    assert [record.model for record in sink.records] == [engine.name]


@BOTH
def test_token_counts_are_the_models_own(kind: Any, engine: PolarModel) -> None:
    model = kind(engine=engine)
    assert model.get_token_ids("héllo") == engine.encode("héllo")
    assert model.get_num_tokens("héllo") == 6
    assert kind(engine=engine, custom_get_token_ids=lambda text: [1]).get_num_tokens("héllo") == 1


def test_the_profile_claims_what_is_there(engine: PolarModel) -> None:
    profile = ChatPolar(engine=engine).profile
    assert profile is not None
    assert profile["max_input_tokens"] == engine.context_window
    assert profile["tool_calling"]
    assert profile["structured_output"]
    assert not profile["image_inputs"]


@BOTH
def test_a_prompt_over_the_window_is_both_errors(kind: Any, engine: PolarModel, sink: ListSink) -> None:
    model = kind(engine=engine)
    with pytest.raises(langchain.ContextOverflowError) as caught:
        model.invoke("x" * 600)
    assert isinstance(caught.value, polar.ContextWindowError)
    assert type(caught.value.__cause__) is polar.ContextWindowError
    with pytest.raises(langchain.ContextOverflowError):
        list(model.stream("x" * 600))
    assert sink.records == []


@BOTH
@pytest.mark.parametrize(
    ("options", "mine"),
    [
        ({"compute": "luxury"}, polar.UnknownTierError),
        ({"program": "0-99"}, polar.ProgramDepthError),
        ({"temperature": -1.0}, polar.SamplingError),
        ({"timeout": 0}, polar.InvalidRequestError),
    ],
)
async def test_a_mistake_surfaces_at_once_in_both_families(
    kind: Any, engine: PolarModel, options: Any, mine: type[Exception]
) -> None:
    model = kind(engine=engine)
    for family in (mine, langchain.ModelInvalidRequestError, ValueError):
        with pytest.raises(family):
            model.invoke("Hello", **options)
    with pytest.raises(mine):
        list(model.stream("Hello", **options))
    with pytest.raises(mine):
        await model.ainvoke("Hello", **options)
    with pytest.raises(mine):
        async for _ in model.astream("Hello", **options):
            pass


@BOTH
def test_an_unknown_model_is_both_errors(kind: Any) -> None:
    with pytest.raises(langchain.ModelNotFoundError) as caught:
        kind(model="./no/such/folder").invoke("Hello")
    assert isinstance(caught.value, FileNotFoundError)


def test_an_error_of_both_families_survives_pickling() -> None:
    with pytest.raises(polar.PolarError) as caught, langchain_errors():
        raise polar.ContextWindowError("too long.", hint="Shorten it.")
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is type(caught.value)
    assert (str(again), again.hint) == ("too long. Shorten it.", "Shorten it.")


def test_errors_without_a_counterpart_pass_as_they_are() -> None:
    with pytest.raises(polar.SinkError) as caught, langchain_errors():
        raise polar.SinkError("the store is full.")
    assert type(caught.value) is polar.SinkError


@BOTH
async def test_a_timeout_stops_the_request_and_says_so(kind: Any, engine: PolarModel, sink: ListSink) -> None:
    model = kind(engine=engine, timeout=1e-9)
    with pytest.raises(polar.RequestTimeoutError) as caught:
        model.invoke("Hello")
    for family in (langchain.ModelTimeoutError, TimeoutError):
        assert isinstance(caught.value, family)
    assert caught.value.usage == pickle.loads(pickle.dumps(caught.value)).usage == sink.records[0]
    with pytest.raises(langchain.ModelTimeoutError):
        await model.ainvoke("Hello")
    with pytest.raises(langchain.ModelTimeoutError):
        list(model.stream("Hello"))
    with pytest.raises(langchain.ModelTimeoutError):
        async for _ in model.astream("Hello"):
            pass
    assert {record.outcome for record in sink.records} == {"cancelled"}
    assert len(sink.records) == 4


@pytest.mark.parametrize("kind", [PolarLLM, ChatPolar, LlamaIndexLLM])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"num_predict": 3}, {"max_tokens": 3}),
        ({"max_completion_tokens": 3}, {"max_tokens": 3}),
        ({"repeat_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"request_timeout": 9.0}, {"timeout": 9.0}),
        ({"logprobs": True, "top_logprobs": 2}, {"logprobs": 2}),
        ({"stop_sequences": ["x"]}, {"stop": ["x"]}),
        ({"base_url": None}, {}),
    ],
)
def test_names_of_other_classes_work(kind: Any, engine: PolarModel, theirs: Any, ours: Any) -> None:
    one, other = kind(engine=engine, **theirs), kind(engine=engine, **ours)
    assert one._answer_options() == other._answer_options()


@BOTH
def test_names_of_other_classes_work_or_say_what_to_use(kind: Any, engine: PolarModel) -> None:
    assert kind(model_name="other").model == "other"
    assert len(_text(kind(engine=engine).invoke("Hello", num_predict=3)).encode()) <= 9
    for name in INSTEAD:
        with pytest.raises(TypeError, match=name):
            kind(engine=engine, **{name: "x"})
    with pytest.raises(TypeError, match="num_predict"):
        kind(engine=engine, num_predict=3, max_tokens=4)


@pytest.mark.parametrize(("surface", "kind"), [("chat", ChatPolar), ("llm", PolarLLM), ("llama_index", LlamaIndexLLM)])
def test_the_table_of_options_names_what_the_classes_have(surface: str, kind: Any) -> None:
    for option in OPTIONS:
        name = option.on(surface)
        taken = {*kind.model_fields, *kind.per_call, *CALLER_OPTIONS, *kind.dropped, "formatted"}
        assert name is None or name in taken, option.name
        if name is None and surface != "llama_index":
            assert option.name not in {*kind.model_fields, *kind.per_call}, option.name


def test_the_table_of_options_names_what_engine_and_command_have() -> None:
    command: Any = typer.main.get_command(app)
    flags = {parameter.name for parameter in command.commands["run"].params}
    for option in OPTIONS:
        assert (option.on("command") in flags) == (option.on("command") is not None), option.name
        assert (option.on("engine") in RequestOptions.__annotations__) == (option.on("engine") is not None), option.name
    assert set(RequestOptions.__annotations__) <= {option.on("engine") for option in OPTIONS}


@BOTH
@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {65: 100.0}},
        {"repetition_penalty": 0.01},
        {"logit_bias": {65: 100.0}, "frequency_penalty": 2.0},
        {"min_p": 1.0, "temperature": 2.0},
        {"stop_repeats": 2, "logit_bias": {65: 100.0}, "max_tokens": 40},
    ],
)
def test_what_steers_an_answer_acts_as_in_the_engine(kind: Any, engine: PolarModel, options: Any) -> None:
    options = {"max_tokens": 10, **options}
    answer = kind(engine=engine, **options).invoke("Hello")
    assert _text(answer) == engine.generate("Hello", **options).text


def test_several_answers_each_with_its_record(engine: PolarModel, sink: ListSink) -> None:
    options: Any = {"engine": engine, "n": 3, "temperature": 1.5, "seed": 5, "max_tokens": 6}
    chat = ChatPolar(**options).generate([[HumanMessage("Hello")]])
    texts = [generation.text for generation in chat.generations[0]]
    assert texts == [engine.generate("Hello", temperature=1.5, seed=5 + place, max_tokens=6).text for place in range(3)]
    assert len(sink.records) == 6
    llm = PolarLLM(**options).generate(["Hello", "Bye"])
    assert [generation.text for generation in llm.generations[0]] == texts
    assert [len(row) for row in llm.generations] == [3, 3]
    assert len({record.request_id for record in sink.records}) == 12
    with pytest.raises(langchain.LangChainException, match="n=3"):
        list(ChatPolar(**options).stream("Hello"))


def test_log_probabilities_are_in_the_metadata(engine: PolarModel) -> None:
    expected = engine.generate("Hello", logprobs=2, max_tokens=4).logprobs
    assert expected is not None
    message = ChatPolar(engine=engine, logprobs=True, top_logprobs=2, max_tokens=4).invoke("Hello")
    content = message.response_metadata["logprobs"]["content"]
    assert [one["logprob"] for one in content] == [one.logprob for one in expected]
    assert [len(one["top_logprobs"]) for one in content] == [2] * 4
    *_, last = ChatPolar(engine=engine, logprobs=2, max_tokens=4).stream("Hello")
    assert last.response_metadata["logprobs"]["content"] == content
    (row,) = PolarLLM(engine=engine, logprobs=2, max_tokens=4).generate(["Hello"]).generations
    assert (row[0].generation_info or {})["logprobs"]["content"] == content
    raw: Any = LlamaIndexLLM(engine=engine, logprobs=2, max_tokens=4).complete("Hello").raw
    assert raw["logprobs"]["content"] == content


def test_a_choice_of_tools_needs_tools(engine: PolarModel) -> None:
    for choice in ("any", "get_weather", {"type": "function", "function": {"name": "x"}}):
        with pytest.raises(langchain.ModelInvalidRequestError, match="needs tools"):
            ChatPolar(engine=engine).invoke("Hello", tool_choice=choice)
    assert ChatPolar(engine=engine, max_tokens=2).invoke("Hello", tool_choice="auto")


@BOTH
def test_a_ledger_that_cannot_be_is_refused_before_a_model_is_loaded(kind: Any) -> None:
    with pytest.raises(polar.PolarError, match="mysql"):
        kind(model="/no/such/model", ledger="mysql://host/polar").invoke("Hello")
