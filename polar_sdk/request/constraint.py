"""Constraints of an answer: a JSON schema, a regular expression, one of several texts, or a grammar.

Turns what a caller asks for into the text of a grammar, or refuses it before anything runs. JSON is written like
Python's `json.dumps`, on one line, with a space after commas and colons: most models write it this way, and no tokens
are spent on whitespace. Knows no tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Final

from polar_sdk.errors import GrammarError, InvalidRequestError
from polar_sdk.reading import Unreadable, parse_json, shown

Schema = Mapping[str, Any] | str | type
"""A JSON schema: a mapping, JSON text, or a class whose schema pydantic knows; a class has its own fields only."""
JSON_STYLE: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How JSON is written; in a grammar with `%json`, the value of its key `x-guidance`."""
CONSTRAINTS: Final = ("schema", "regex", "choice", "grammar")
_VALUES: Final = frozenset({"const", "enum", "default", "examples"})
"""Keys of a schema whose values are not schemas."""
_DATE: Final = (
    r"([1-9]\d{3}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
    r"|[1-9]\d(0[48]|[2468][048]|[13579][26])-02-29)"
)
_TIME: Final = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_CLOCK: Final = r"(\d{1,4}H(\d{1,4}M(\d{1,4}S)?)?|\d{1,4}M(\d{1,4}S)?|\d{1,4}S)"
_DURATION: Final = rf"P(\d{{1,4}}W|\d{{1,4}}D(T{_CLOCK})?|T{_CLOCK})"
_PATTERNS: Final = {"date": _DATE, "time": _TIME, "date-time": f"{_DATE}T{_TIME}", "duration": _DURATION}
_FORMATS: Final = frozenset({*_PATTERNS, "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
"""Those that a grammar can follow."""
_NAMED: Final = frozenset({"properties", "patternProperties", "$defs", "definitions"})
"""Keys of a schema whose values are maps from names to schemas."""
_FIELDS: Final = frozenset({"properties", "patternProperties"})
_UNFOLLOWED: Final = frozenset({"uniqueItems", "not", "if", "contains", "dependentRequired", "dependentSchemas"})
"""Keys that no grammar can enforce."""
_DECIMAL: Final = ["number", "string"]
_FINITE: Final = {"minimum": -(10**15), "maximum": 10**15}
_EXACT: Final = 2**53
"""Grammars know numbers as doubles, which hold every integer up to this one."""
_WIDEST: Final = 2**63 - 1024
"""And integers of 64 bits: the last double among them."""
_LIMITS: Final = {"minimum": 1, "exclusiveMinimum": 1, "maximum": -1, "exclusiveMaximum": -1}
"""Keys of a schema that bound a number, and the direction in which its values are."""
_MAX_TEXT: Final = 1_000_000
"""Unit: characters."""
_MAX_CHOICES: Final = 10_000


def grammar_text(options: Mapping[str, object]) -> str | None:
    """The grammar that the options of a request ask for, or None.

    Raises:
        InvalidRequestError: More than one is given, or one of the wrong type.
        GrammarError: A schema that is not valid JSON.
        MissingExtraError: llguidance is not installed.
    """
    given = [name for name in CONSTRAINTS if options.get(name) is not None]
    if not given:
        return None
    if len(given) > 1:
        raise InvalidRequestError(f"{' and '.join(f'{name}=' for name in given)} exclude each other; pass one of them.")
    from polar_sdk.engine.grammar import import_llguidance  # with torch, which whoever makes schemas does not need

    matcher = import_llguidance().LLMatcher
    value: Any = options.get(given[0])
    if given[0] == "schema":
        return str(matcher.grammar_from_json_schema(schema_text(value), overrides=JSON_STYLE))
    if given[0] == "choice":
        return str(matcher.grammar_from_lark(_choices(value)))
    if not isinstance(value, str) or not value or len(value) > _MAX_TEXT:
        raise InvalidRequestError(f"{given[0]}={shown(value)} is not a text of 1 to {_MAX_TEXT:,} characters.")
    return str(matcher.grammar_from_regex(value) if given[0] == "regex" else matcher.grammar_from_lark(_lark(value)))


def _lark(grammar: str) -> str:
    """A grammar as Lark, be it that or GBNF.

    Raises:
        GrammarError: It is neither.
    """
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except Exception as error:  # its own, which is of no other class
        raise GrammarError(f"the grammar is neither Lark nor GBNF: {' '.join(str(error).split())[:200]}.") from error


def schema_text(schema: Schema) -> str:
    """A JSON schema as JSON text.

    Raises:
        InvalidRequestError: It is of another type, or larger than a schema may be.
        GrammarError: It is not a JSON object.
    """
    read = json_schema(schema)
    try:
        text = json.dumps(followable(read), allow_nan=False)
        parse_json(text, max_bytes=_MAX_TEXT)  # within limits of depth and size, whatever it came from
    except GrammarError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is not a JSON document: {str(error)[:200]}.") from error
    return text


def json_schema(schema: Schema) -> dict[str, Any]:
    """A JSON schema as a mapping.

    Raises:
        InvalidRequestError: It is of another type.
        GrammarError: It is not a JSON object, or pydantic knows no schema for the class.
    """
    if isinstance(schema, str):
        try:
            schema = parse_json(schema, max_bytes=_MAX_TEXT)
        except Unreadable as error:
            raise GrammarError(f"the schema is not valid JSON: {error}.") from error
    if isinstance(schema, Mapping):
        return dict(schema)
    if isinstance(schema, type):
        from pydantic import PydanticUserError, TypeAdapter

        try:
            whole = _at_its_root(TypeAdapter(schema).json_schema())
            own: dict[str, Any] = _with_parts(closed(whole), partial(_as_written, whole.get("$defs", {})))
            return own
        except PydanticUserError as error:
            raise GrammarError(
                f"{schema.__name__} has no JSON schema: {str(error).splitlines()[0].rstrip('.')}."
            ) from error
    raise InvalidRequestError(f"schema={shown(schema)} is not a JSON schema; pass a mapping, JSON text or a class.")


def closed(schema: Any) -> Any:
    """The schema without fields that it does not name; where it says something of other fields, that stays."""
    return _with_parts(schema, _close)


def followable(schema: Any) -> Any:
    """The schema in terms that a grammar can follow, where an answer to it is one to the schema as it was.

    Dates, times and durations exist and are as common parsers read them; formats that no grammar knows say nothing, as
    JSON Schema has it; names of fields are those listed, or match a pattern. Bounds beyond 2^53 are the next number
    within that a grammar can hold.

    Raises:
        GrammarError: A number is not one that a grammar can hold.
    """
    read = _with_parts(schema, _make_followable)
    _refuse_unfollowed(read)
    return read


def _with_parts(part: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A schema in which each schema was changed, the innermost first."""
    if isinstance(part, list):
        return [_with_parts(item, change) for item in part]
    if not isinstance(part, dict):
        return part
    read = dict(part)
    for key, value in part.items():
        if key in _NAMED and isinstance(value, dict):
            read[key] = {name: _with_parts(item, change) for name, item in value.items()}
        elif key not in _VALUES:
            read[key] = _with_parts(value, change)
    return change(read)


def _close(part: dict[str, Any]) -> dict[str, Any]:
    if isinstance(part.get("properties"), dict) and not {"type", "$ref"}.isdisjoint(part) and "allOf" not in part:
        part.setdefault("additionalProperties", False)
    return part


def _at_its_root(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a class that refers to itself, whose root is a reference, with its fields at the root."""
    place, _, name = str(schema.get("$ref", "")).rpartition("/")
    target = schema.get("$defs", {}).get(name) if place == "#/$defs" else None
    return {**target, "$defs": schema["$defs"]} if isinstance(target, dict) else schema


def _as_written(known: Mapping[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """The schema that pydantic reads of a class's fields, as far as a grammar can write it.

    None can keep a list from having an item twice, and a Python set takes it all the same. A decimal number is finite.
    """
    part.pop("uniqueItems", None)
    names = part.get("propertyNames")
    if isinstance(names, dict) and "$ref" in names:  # an enumeration
        part["propertyNames"] = known.get(str(names["$ref"]).rpartition("/")[2], names)
    options = part.get("anyOf")
    if isinstance(options, list) and [one.get("type") for one in options if isinstance(one, dict)] == _DECIMAL:
        part["anyOf"] = [{**_FINITE, **options[0]}]  # the text beside it keeps none of the number's bounds
    return part


def _refuse_unfollowed(part: Any, place: str = "") -> None:
    """Refuse what no grammar can enforce, with the field that asks for it.

    Raises:
        GrammarError: There is such a key.
    """
    if isinstance(part, list):
        for item in part:
            _refuse_unfollowed(item, place)
    if not isinstance(part, dict):
        return
    for key, value in part.items():
        if key in _NAMED and isinstance(value, dict):
            for name, field in value.items():
                _refuse_unfollowed(field, f"{place}.{name}" if place and key in _FIELDS else name)
        elif key in _UNFOLLOWED and value is not False:
            where = f"field {place!r}" if place else "the schema"
            raise GrammarError(
                f"{where} has {key}, which no grammar can enforce; remove it, and check the answer yourself.",
            )
        elif key not in _VALUES:
            _refuse_unfollowed(value, place)


def _make_followable(part: dict[str, Any]) -> dict[str, Any]:
    name = part.get("format")
    if isinstance(name, str) and name in _PATTERNS and "pattern" not in part:
        del part["format"]
        part["pattern"] = f"^{_PATTERNS[name]}$"
    elif isinstance(name, str) and name not in _FORMATS:
        del part["format"]
    _hold_numbers(part)
    limits = [part.get(key) for key in ("maximum", "exclusiveMaximum")]
    most = min((limit for limit in limits if isinstance(limit, float)), default=1.0)
    above, least = part.get("exclusiveMinimum"), part.get("minimum", 0)
    if above == 0 and above is not False and isinstance(least, int | float) and 0 < most < 1:
        del part["exclusiveMinimum"]  # llguidance would let 0 through
        part["minimum"] = max(least, most / 1000)
    names, others = part.get("propertyNames"), part.get("additionalProperties", True)
    if isinstance(names, dict) and _FIELDS.isdisjoint(part) and (fields := _fields_named(names, others)):
        del part["propertyNames"]
        part |= fields
    return part


def _hold_numbers(part: dict[str, Any]) -> None:
    """Bound numbers by those that a grammar can hold; refuse others."""
    for key in ("const", "enum", "multipleOf"):
        if key in part and (number := _inexact(part[key])) is not None:
            raise GrammarError(
                f"{key} has the integer {shown(number)}, which no grammar can hold exactly; use at most {_EXACT:,}, or "
                "a string with a pattern."
            )
    whole = part.get("type") != "number"
    given = {key: part[key] for key in _LIMITS if _is_number(part.get(key)) and abs(part[key]) > _EXACT}
    for key, way in _LIMITS.items():
        if key not in given:
            continue
        name, limit = key, given[key]
        if whole and name.startswith("exclusive") and isinstance(limit, int):
            name = f"m{key[-6:]}"
            beside: Any = part.get(name)
            limit = part.pop(key) + way
            if _is_number(beside) and way * beside > way * limit:
                limit = beside
        held = _next_double(limit, way)
        if whole and way * held > _WIDEST:
            raise GrammarError(f"{key} = {shown(given[key])}: no integer beyond {_WIDEST:,} is written; use less.")
        part[name] = -way * _WIDEST if whole and way * held < -_WIDEST else held
    least = max((part[key] for key in ("minimum", "exclusiveMinimum") if _is_number(part.get(key))), default=-math.inf)
    most = min((part[key] for key in ("maximum", "exclusiveMaximum") if _is_number(part.get(key))), default=math.inf)
    if given and least > most:
        said = " and ".join(f"{key} = {shown(limit)}" for key, limit in given.items())
        raise GrammarError(f"{said} leave no number that a grammar can hold exactly; use at most {_EXACT:,}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _next_double(limit: int | float, way: int) -> int | float:
    """The nearest double that is not beyond a limit, an integer as an integer."""
    try:
        nearest = float(limit)
    except OverflowError:
        return way * _WIDEST * 2  # further than any that is written
    if isinstance(limit, int) and way * (int(nearest) - limit) < 0:
        nearest = math.nextafter(nearest, way * math.inf)
    return int(nearest) if isinstance(limit, int) else nearest


def _inexact(value: Any) -> int | None:
    """An integer within a value that is not the same as a double."""
    if isinstance(value, list | tuple):
        return next((found for one in value if (found := _inexact(one)) is not None), None)
    if isinstance(value, Mapping):
        return _inexact(list(value.values()))
    if isinstance(value, int) and abs(value) > _EXACT and (abs(value) >= 2**63 or int(float(value)) != value):
        return value
    return None


def _fields_named(names: dict[str, Any], value: Any) -> dict[str, Any]:
    """The keys that say the same as `propertyNames`; none where a grammar has none."""
    match {key: what for key, what in names.items() if key not in {"type", "title", "description"}}:
        case {"enum": [*texts], **rest} if not rest and all(isinstance(text, str) for text in texts):
            return {"properties": dict.fromkeys(texts, value), "additionalProperties": False}
        case {"const": str() as text, **rest} if not rest:
            return {"properties": {text: value}, "additionalProperties": False}
        case {"pattern": str() as pattern, **rest} if not rest:
            return {"patternProperties": {pattern: value}, "additionalProperties": False}
    return {}


def _choices(value: Any) -> str:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InvalidRequestError(f"choice={shown(value)} is not a list of texts; pass one.")
    texts = list(islice(value, _MAX_CHOICES + 1))
    if not 1 <= len(texts) <= _MAX_CHOICES:
        raise InvalidRequestError(f"choice= has {len(value):,} texts; pass 1 to {_MAX_CHOICES:,}.")
    for text in texts:
        if not isinstance(text, str) or not text:
            raise InvalidRequestError(f"choice {shown(text)} is not a text of at least one character.")
    return "start: " + " | ".join(json.dumps(text) for text in texts)
