"""What an answer must look like: a JSON schema, a regular expression, one of several texts, or a grammar.

Turns what a caller asks for into the text of a grammar, or refuses it before anything runs. JSON is written as Python's
`json.dumps` does, on one line, with a space after commas and colons: so most models write it, and no tokens are spent
on white space. Knows no tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from polar_sdk.errors import GrammarError, InvalidRequestError
from polar_sdk.reading import Unreadable, parse_json, shown

if TYPE_CHECKING:
    from polar_sdk.request.options import RequestOptions

Schema = Mapping[str, Any] | str | type
"""A JSON schema: a mapping, JSON text, or a class whose schema pydantic knows; a class has its own fields only."""
JSON_STYLE: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How JSON is written; in a grammar with `%json`, the value of its key `x-guidance`."""
_OPTIONS: Final = ("schema", "regex", "choice", "grammar")
_VALUES: Final = frozenset({"const", "enum", "default", "examples"})
"""Keys of a schema whose values are not schemas."""
_DATE: Final = (
    r"([1-9]\d{3}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
    r"|[1-9]\d(0[48]|[2468][048]|[13579][26])-02-29)"
)
_TIME: Final = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_FORMATS: Final = {"date": _DATE, "time": _TIME, "date-time": f"{_DATE}T{_TIME}"}
_MAX_TEXT: Final = 1_000_000
"""Unit: characters."""
_MAX_CHOICES: Final = 10_000


def grammar_text(options: RequestOptions) -> str | None:
    """The grammar that the options ask for, or None.

    Raises:
        InvalidRequestError: More than one is given, or one of the wrong type.
        GrammarError: A schema that is not valid JSON.
        MissingExtraError: llguidance is not installed.
    """
    given = [name for name in _OPTIONS if options.get(name) is not None]
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
    return str(matcher.grammar_from_regex(value) if given[0] == "regex" else matcher.grammar_from_lark(value))


def schema_text(schema: Schema) -> str:
    """A JSON schema as JSON text.

    Raises:
        InvalidRequestError: It is of another type, or larger than a schema may be.
        GrammarError: It is not a JSON object.
    """
    read = json_schema(schema)
    try:
        text = json.dumps(with_formats(read), allow_nan=False)
        parse_json(text, max_bytes=_MAX_TEXT)  # within limits of depth and size, whatever it came from
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
            own: dict[str, Any] = closed(TypeAdapter(schema).json_schema())
            return own
        except PydanticUserError as error:
            raise GrammarError(
                f"{schema.__name__} has no JSON schema: {str(error).splitlines()[0].rstrip('.')}."
            ) from error
    raise InvalidRequestError(f"schema={shown(schema)} is not a JSON schema; pass a mapping, JSON text or a class.")


def closed(part: Any) -> Any:
    """The schema without fields that it does not name; where it says something of other fields, that stays."""
    if isinstance(part, list):
        return [closed(item) for item in part]
    if not isinstance(part, dict):
        return part
    read = {key: value if key in _VALUES else closed(value) for key, value in part.items()}
    if isinstance(read.get("properties"), dict) and not {"type", "$ref"}.isdisjoint(part) and "allOf" not in part:
        read.setdefault("additionalProperties", False)
    return read


def with_formats(part: Any) -> Any:
    """The schema with patterns for dates and times: every answer is a time that exists, as common parsers read it."""
    if isinstance(part, list):
        return [with_formats(item) for item in part]
    if not isinstance(part, dict):
        return part
    read = {key: value if key in _VALUES else with_formats(value) for key, value in part.items()}
    name = read.get("format")
    if isinstance(name, str) and name in _FORMATS and "pattern" not in read:
        del read["format"]
        read["pattern"] = f"^{_FORMATS[name]}$"
    return read


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
