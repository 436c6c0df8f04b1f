"""Classes that people write: whatever a random network answers, it is an object of the class."""

from __future__ import annotations

import enum
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID

import pytest
from langchain_core.tools import tool
from llama_index.core import PromptTemplate
from pydantic import BaseModel, Field

from langchain_polar import ChatPolar
from llama_index_polar import PolarLLM
from polar_sdk.errors import GrammarError
from polar_sdk.testing import tiny_model


class Node(BaseModel):
    """A tree."""

    value: int
    children: list[Node] = []


class Person(BaseModel):
    """Someone in a family."""

    name: Annotated[str, Field(max_length=12)]
    partner: Family | None = None


class Family(BaseModel):
    members: Annotated[list[Person], Field(max_length=2)]


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, Field(ge=0, le=9)]


class Dog(BaseModel):
    kind: Literal["dog"]
    good: bool


class Pet(BaseModel):
    pet: Cat | Dog = Field(discriminator="kind")
    either: int | bool


class Sets(BaseModel):
    numbers: set[int]
    letters: frozenset[Literal["a", "b"]]


class Point(NamedTuple):
    x: int
    y: int


class Tuples(BaseModel):
    pair: tuple[int, bool]
    many: Annotated[tuple[int, ...], Field(max_length=3)]
    point: Point


class Times(BaseModel):
    day: date
    moment: datetime
    hour: time
    length: timedelta


class Money(BaseModel):
    amount: Decimal
    tax: Annotated[Decimal, Field(ge=0, le=1)]


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Enums(BaseModel):
    color: Color
    level: Level
    by_color: dict[Color, int]


class Nested(BaseModel):
    a: Node | None = None
    b: list[Pet | None] | None = None


class Bounded(BaseModel):
    count: Annotated[int, Field(gt=0, multiple_of=5)]
    large: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
    share: Annotated[float, Field(ge=0, le=1)]
    code: Annotated[str, Field(pattern=r"^[A-Z]{3}-\d{2}$")]


class Ids(BaseModel):
    key: UUID
    flags: Annotated[list[bool], Field(min_length=2, max_length=4)]
    labels: dict[str, bool]


for each in (Node, Person, Family):
    each.model_rebuild()
CLASSES = [Node, Person, Pet, Sets, Tuples, Times, Money, Enums, Nested, Bounded, Ids, Family]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(context_window=4096)


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: str(kind.__name__))
def test_every_answer_is_an_object_of_the_class(kind: type[BaseModel], method: Any, model: Any) -> None:
    for seed in range(3):
        chat = ChatPolar(engine=model, max_tokens=300, temperature=seed / 2, seed=seed)
        assert isinstance(chat.with_structured_output(kind, method=method).invoke("Hello"), kind)


def test_recursive_parts_reach_the_grammar(model: Any) -> None:
    @tool
    def plant(tree: Node) -> str:
        """Plant a tree."""
        return str(tree.value)

    for bound in (ChatPolar(engine=model).bind_tools([Node]), ChatPolar(engine=model).bind_tools([plant])):
        said: Any = bound
        (declared,) = said.kwargs["tools"]
        assert "$ref" in str(declared["function"]["parameters"])
        assert declared["function"]["parameters"]["properties"]
    calling = ChatPolar(engine=model, max_tokens=200, temperature=1.0, seed=2).bind_tools([plant], tool_choice="plant")
    (call,) = calling.invoke("Hello").tool_calls
    assert plant.invoke(call["args"])


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: str(kind.__name__))
def test_llama_index_predicts_objects_of_the_class(kind: type[BaseModel], model: Any) -> None:
    llm = PolarLLM(engine=model, max_tokens=300)
    assert isinstance(llm.structured_predict(kind, PromptTemplate("Hello")), kind)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_what_cannot_be_enforced_is_named_and_no_grammar_is_shown(method: Any, model: Any) -> None:
    inner = {"type": "object", "properties": {"q": {"type": "array", "uniqueItems": True}}}
    schema = {"title": "x", "type": "object", "properties": {"a": {"type": "array", "items": inner}}}
    with pytest.raises(GrammarError, match=r"'a\.q' has uniqueItems"):
        ChatPolar(engine=model).with_structured_output(schema, method=method).invoke("Hello")
    odd = {"title": "x", "type": "object", "properties": {"a": {"type": "string", "pattern": "(?<=a)b"}}}
    with pytest.raises(GrammarError) as caught:
        ChatPolar(engine=model).with_structured_output(odd, method=method).invoke("Hello")
    assert "%json" not in str(caught.value)


@pytest.mark.model
@pytest.mark.long
@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: str(kind.__name__))
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"])
def test_answers_of_trained_models_are_objects_of_the_class(name: str, kind: type[BaseModel]) -> None:
    for temperature in (0.0, 1.0):
        chat = ChatPolar(model=name, compute="exact", ledger=None, max_tokens=300, temperature=temperature, seed=1)
        assert isinstance(chat.with_structured_output(kind).invoke(f"Make up a {kind.__name__.lower()}."), kind)
