"""Settings and options of the LangChain models: what is refused, what acts, what tells two models apart."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest
from langchain_core import exceptions as langchain
from langchain_core.runnables import ConfigurableField

from langchain_polar import ChatPolar, PolarLLM
from langchain_polar.errors import langchain_errors
from polar_sdk import ListSink, Program
from polar_sdk import errors as polar
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
