"""Many JSON schemas: every answer is valid by another library's judgement, or says that it was cut off."""

from __future__ import annotations

import json
from datetime import time
from functools import cache
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from polar_sdk import ListSink, PolarModel
from polar_sdk.errors import GrammarError
from polar_sdk.testing import tiny_model

if TYPE_CHECKING:
    from polar_sdk.request.generation import Generation

PROMPTS = ("Describe Anna, 42, of Köln.", "Write JSON: [1, 2")


def _object(required: list[str] | None = None, /, **properties: Any) -> dict[str, Any]:
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


TEXT, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
FLAG, NULL = {"type": "boolean"}, {"type": "null"}
TREE: dict[str, Any] = {
    "$defs": {"node": _object(["value"], value=INTEGER, children={"type": "array", "items": {"$ref": "#/$defs/node"}})},
    "$ref": "#/$defs/node",
}
LIST: dict[str, Any] = {
    "$defs": {"item": _object(head=INTEGER, tail={"anyOf": [{"$ref": "#/$defs/item"}, NULL]})},
    "$ref": "#/$defs/item",
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "anything": {},
    "string": TEXT,
    "integer": INTEGER,
    "number": NUMBER,
    "boolean": FLAG,
    "null": NULL,
    "types": {"type": ["integer", "null"]},
    "const object": {"const": {"a": [1, None, "é"]}},
    "enum mixed": {"enum": [1, "one", None, True, {"a": 1}, [2]]},
    "enum prefixes": {"enum": ["a", "ab", "abc", "abcd"]},
    "enum unicode": {"enum": ["größe", "日本語", "🙂🙃", "e\u0301"]},
    "enum quotes": {"enum": ['say "hi"', "back\\slash", "line\nbreak", "tab\t"]},
    "empty object": _object(),
    "optional field": _object(["name"], name=TEXT, age=INTEGER),
    "all optional": _object([], a=TEXT, b=INTEGER, c=FLAG),
    "optional first": _object(["z"], a=TEXT, b=TEXT, z=INTEGER),
    "unicode names": _object(größe=INTEGER, 名前=TEXT, **{"🙂": FLAG}),
    "odd names": _object(**{"a b": INTEGER, 'q"q': INTEGER, "": INTEGER, "$ref": INTEGER, "a/b~c": INTEGER}),
    "person": _object(
        name=TEXT,
        age={"type": "integer", "minimum": 0, "maximum": 150},
        address=_object(street=TEXT, zip={"type": "string", "pattern": "^[0-9]{5}$"}),
        tags={"type": "array", "items": TEXT},
    ),
    "bounds": {"type": "integer", "minimum": -5, "maximum": 5},
    "wide bounds": {"type": "integer", "minimum": 999, "maximum": 1_000_001},
    "exclusive bounds": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3},
    "number bounds": {"type": "number", "minimum": 0, "maximum": 1},
    "number above": {"type": "number", "exclusiveMinimum": 0.5},
    "bounds of 64 bits": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "bounds beyond doubles": {"type": "integer", "minimum": 2**60 + 1, "maximum": 2**60 + 700},
    "exclusive beyond doubles": {"type": "integer", "exclusiveMinimum": 2**60 - 1, "exclusiveMaximum": 2**60 + 1},
    "negative beyond doubles": {"type": "integer", "minimum": -(2**60) - 700, "maximum": -(2**60) - 1},
    "beyond 64 bits": {"type": "integer", "minimum": -(10**30), "maximum": 10**30},
    "number beyond doubles": {"type": "number", "minimum": 2**60 + 1, "maximum": 2**60 + 700},
    "constant of 60 bits": {"const": 2**60},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 1000},
    "long text": {"type": "string", "minLength": 5},
    "short text": {"type": "string", "maxLength": 3},
    "pattern": {"type": "string", "pattern": "^[A-Z]{3}-\\d{4}$"},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "date-time": {"type": "string", "format": "date-time"},
    "duration": {"type": "string", "format": "duration"},
    "unknown format": _object(level={"type": "integer", "format": "int32"}, word={"type": "string", "format": "poem"}),
    "uuid": {"type": "string", "format": "uuid"},
    "items": {"type": "array", "items": INTEGER, "minItems": 2, "maxItems": 4},
    "many items": {"type": "array", "items": FLAG, "minItems": 9},
    "tuple": {"type": "array", "prefixItems": [INTEGER, TEXT], "items": False, "minItems": 2},
    "open tuple": {"type": "array", "prefixItems": [INTEGER], "items": FLAG, "minItems": 1},
    "anyOf objects": {"anyOf": [_object(a=INTEGER), _object(b=TEXT)]},
    "anyOf null": _object(a={"anyOf": [TEXT, NULL]}),
    "oneOf tags": {"oneOf": [_object(kind={"const": "a"}, x=INTEGER), _object(kind={"const": "b"}, y=TEXT)]},
    "allOf": {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 9}]},
    "ref": {"$defs": {"color": {"enum": ["r", "g"]}}, **_object(a={"$ref": "#/$defs/color"})},
    "ref pointer": _object(a=INTEGER, b={"$ref": "#/properties/a"}),
    "ref escaped": {"$defs": {"a/b": INTEGER}, "$ref": "#/$defs/a~1b"},
    "tree": TREE,
    "list": LIST,
    "map": {"type": "object", "additionalProperties": INTEGER},
    "map of lists": {"type": "object", "additionalProperties": {"type": "array", "items": FLAG}},
    "propertyNames by list": {
        "type": "object",
        "propertyNames": {"enum": ["a", "b"]},
        "additionalProperties": INTEGER,
        "minProperties": 1,
    },
    "propertyNames by pattern": {"type": "object", "propertyNames": {"type": "string", "pattern": "^[a-z]{1,3}$"}},
    "keys as names": _object(format=TEXT, propertyNames=_object(enum={"type": "string", "format": "date"})),
    "barely above 0": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.001},
    "above 0 and not below a bound": {
        "type": "number",
        "exclusiveMinimum": 0,
        "minimum": 0.0005,
        "maximum": 0.001,
    },
    "patternProperties": {"type": "object", "patternProperties": {"^n_": INTEGER}, "additionalProperties": False},
    "open object": {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
    "required unknown": {"type": "object", "required": ["a", "b"]},
    "some properties": {"type": "object", "minProperties": 2, "additionalProperties": INTEGER},
    "described": {
        "title": "T",
        "description": "d",
        "examples": [1],
        "default": 3,
        "type": "integer",
        "deprecated": True,
    },
    "big": _object(**{f"field_{index}": INTEGER for index in range(20)}),
}


_FORMATS = jsonschema.FormatChecker()


def _is_time(value: object) -> bool:  # theirs knows no time zones, which RFC 3339 requires
    return not isinstance(value, str) or time.fromisoformat(value).tzinfo is not None


_FORMATS.checks("time", raises=ValueError)(_is_time)


@cache
def _tiny() -> PolarModel:
    return tiny_model(context_window=4096)


@cache
def _real() -> PolarModel:
    return PolarModel.from_pretrained(ledger=None)


def _check(schema: dict[str, Any], generation: Generation) -> None:
    if generation.complete:
        jsonschema.Draft202012Validator(schema, format_checker=_FORMATS).validate(json.loads(generation.text))
        assert generation.json() == json.loads(generation.text)
    else:
        assert generation.finish_reason == "length"


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_of_a_random_model_are_valid(name: str) -> None:
    each: Any = [{"seed": seed, "temperature": seed % 2} for seed, _ in enumerate(PROMPTS)]
    max_tokens = 320 if name == "big" else 96
    for answer in _tiny().generate_batch(PROMPTS, each=each, schema=SCHEMAS[name], max_tokens=max_tokens):
        _check(SCHEMAS[name], answer)
        assert answer.complete, f"steering found no end: {answer.text!r}"


@pytest.mark.parametrize("name", SCHEMAS)
def test_without_steering_an_answer_is_valid_or_says_that_it_was_cut_off(name: str) -> None:
    answer = _tiny().generate(PROMPTS[0], schema=SCHEMAS[name], max_tokens=24, fit_max_tokens=False)
    _check(SCHEMAS[name], answer)


@pytest.mark.model
@pytest.mark.parametrize("name", list(SCHEMAS)[::6])
def test_answers_of_the_default_model_are_valid(name: str) -> None:
    max_tokens = 480 if name == "big" else 160
    for answer in _real().generate_batch(PROMPTS, schema=SCHEMAS[name], max_tokens=max_tokens):
        _check(SCHEMAS[name], answer)
        assert answer.complete


UNSUPPORTED: dict[str, Any] = {
    "not": {"not": TEXT},
    "if": {"if": TEXT, "then": TEXT},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": INTEGER},
    "dependentRequired": {"dependentRequired": {"a": ["b"]}},
    "propertyNames": {"propertyNames": {"maxLength": 3}},
    "propertyNames beside properties": {"properties": {"a": INTEGER}, "propertyNames": {"pattern": "^a"}},
    "type": {"type": "banana"},
    "look-around": {"type": "string", "pattern": "(?<=a)b"},
    "remote": {"$ref": "https://example.com/schema"},
    "dangling": {"$ref": "#/$defs/none"},
    "overlapping oneOf": {"oneOf": [INTEGER, NUMBER]},
    "nothing": {"type": "integer", "minimum": 5, "maximum": 3},
    "one integer beyond doubles": {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 1},
    "least beyond 64 bits": {"type": "integer", "minimum": 10**30},
    "constant beyond doubles": {"const": {"a": [2**53 + 1]}},
    "choice beyond 64 bits": {"enum": [1, 2**64]},
    "multiple beyond doubles": {"type": "integer", "multipleOf": 2**53 + 1},
    "no choice": {"enum": []},
    "forbidden field": {"properties": {"a": False}, "required": ["a"], "type": "object"},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_schema_that_cannot_be_followed_is_refused_before_compute(name: str) -> None:
    sink = ListSink()
    with pytest.raises(GrammarError):
        tiny_model(sink=sink).generate("Hello", schema=UNSUPPORTED[name])
    assert sink.records == []
