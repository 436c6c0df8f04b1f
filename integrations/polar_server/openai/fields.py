"""Kinds of fields in request bodies, for pydantic models, and refusals that name a field.

The model of a body is both its check and its schema in the OpenAPI document, so the document cannot promise what the
server refuses. A field that no model knows is reported, never silently dropped. Knows no endpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError, core_schema

from polar_sdk.errors import SamplingError, nearest
from polar_sdk.frameworks.options import HTTP_NAMES, NEUTRAL
from polar_sdk.reading import shown
from polar_sdk.request.options import MAX_BIASES, check_biases
from polar_server.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler

B = TypeVar("B", bound="Body")


def invalid(param: str, why: str, *, code: str = "invalid_value") -> ApiError:
    """The refusal of a field."""
    return ApiError(f"{param}: {why}", code=code, param=param)


def unsupported(param: str, why: str) -> ApiError:
    """The refusal of a field that this server cannot serve."""
    return ApiError(f"{param} is not supported: {why}", code="unsupported_value", param=param)


class Text:
    """A text. pydantic's own refuses half of a surrogate pair, which JSON can hold.

    Args:
        most: Maximum length. Unit: characters.
    """

    def __init__(self, most: int = 1_000_000) -> None:
        self._most = most

    def __get_pydantic_core_schema__(self, _: Any, __: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._validate)

    def __get_pydantic_json_schema__(self, _: Any, __: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "maxLength": self._most}

    def check(self, param: str, value: Any) -> str:
        """The text, of a value that is in no model.

        Raises:
            ApiError: It is not a text, or too long.
        """
        if (fault := self._fault(value)) is not None:
            raise invalid(param, fault)
        return str(value)

    def _validate(self, value: Any) -> str:
        if (fault := self._fault(value)) is not None:
            raise wrong(fault)
        return str(value)

    def _fault(self, value: Any) -> str | None:
        if not isinstance(value, str):
            return f"{shown(value)} is not text."
        if len(value) > self._most:
            return f"the text has {len(value):,} characters; use at most {self._most:,}."
        return None


class Only:
    """A field of the API that has one meaning here: any of `values` says so, and anything else is refused.

    Args:
        *values: What says so.
        why: Why there is no other.
    """

    def __init__(self, *values: Any, why: str) -> None:
        self._values, self._why = values, why

    def __get_pydantic_core_schema__(self, _: Any, __: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._validate)

    def __get_pydantic_json_schema__(self, _: Any, __: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [*self._values, None]}

    def _validate(self, value: Any) -> None:
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in self._values):
            raise PydanticCustomError("unsupported", self._why)


def unserved(why: str) -> Only:
    """A field that this server cannot serve, unless it says nothing."""
    return Only(None, False, [], {}, why=why)


def wrong(why: str) -> PydanticCustomError:
    """The fault of a field, raised within a validator."""
    return PydanticCustomError("invalid", why)


def _listed(value: Any) -> Any:
    """One text or several, as a list."""
    several = value if isinstance(value, list) else [value]
    if len(several) > _MAX_STOPS:
        raise wrong(f"there are {len(several)}; use at most {_MAX_STOPS}.")
    if "" in several:
        raise wrong("an empty text ends every answer at once; remove it.")
    return several


def _few(value: Any) -> Any:
    """Count before anything in it is looked at."""
    if isinstance(value, Mapping) and len(value) > _MAX_LABELS:
        raise wrong(f"there are {len(value)} entries; use at most {_MAX_LABELS}.")
    return value


def _biases(value: Any) -> dict[int, float]:
    try:
        return dict(check_biases(value))
    except SamplingError as error:
        raise wrong(str(error)) from None


_MAX_STOPS: Final = 4
_MAX_LABELS: Final = 16
MAX_TOKENS: Final = 2**31 - 1
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Top = Annotated[int, Field(ge=0, le=20)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Biases = Annotated[
    dict[int, float],
    PlainValidator(_biases),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": MAX_BIASES,
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
]
"""`logit_bias`: what is added to the logits of tokens, by their ids."""
Name = Annotated[str, Text(200)]
_Stop = Annotated[str, Text(1_000)]
Stops = Annotated[
    list[_Stop],
    BeforeValidator(_listed, json_schema_input_type=_Stop | Annotated[list[_Stop], Field(max_length=_MAX_STOPS)]),
]
Labels = Annotated[
    dict[Annotated[str, Text()], Annotated[str, Text(512)]], Field(max_length=_MAX_LABELS), BeforeValidator(_few)
]


class Body(BaseModel):
    """A request body. Null is as good as absent."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)

    other_names: ClassVar[Mapping[str, str]] = {}
    """Fields of other bodies, and what they are called here."""


_WORDS: Final = {
    "int_type": "{value} is not a whole number.",
    "float_type": "{value} is not a number.",
    "finite_number": "{value} is not a number.",
    "bool_type": "{value} is neither true nor false.",
    "dict_type": "{value} is not an object.",
    "greater_than_equal": "{value} is out of range; use at least {ge:,}.",
    "less_than_equal": "{value} is out of range; use at most {le:,}.",
    "literal_error": "{value} is unknown; use {expected}.",
    "missing": "it is required, and missing.",
}
_CODES: Final = {
    "unsupported": "unsupported_value",
    "literal_error": "unsupported_value",
    "missing": "missing_required_parameter",
}
_SHOWN: Final = 8
_STRUCTURED: Final = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
    "disable_any_whitespace": "disable_any_whitespace",
    "disable_additional_properties": "disable_additional_properties",
}
"""Parts of vLLM's `structured_outputs`, and the fields that they are here."""


def read(content: Mapping[str, Any], model: type[B], *, lenient: bool) -> tuple[B, int]:
    """A body, whose fields may have the names that vLLM and llama.cpp give them.

    Args:
        content: The fields.
        model: Of the body.
        lenient: Ignore fields that the model does not know.

    Returns:
        The body, and the number of ignored fields.

    Raises:
        ApiError: A field has a wrong value, is missing, is given twice or is unknown.
    """
    given, unknown, spelt = _renamed(content, model)
    try:
        body, failed = model.model_validate({name: value for name, value in given.items() if value is not None}), None
    except ValidationError as error:
        # The first fault in the caller's order; what is missing comes last.
        place = {name: index for index, name in enumerate(given)}
        failed = min(error.errors(include_url=False), key=lambda one: place.get(str(one["loc"][0]), len(place)))
        if failed["type"] != "missing":
            raise _refusal(failed, spelt) from error
    if unknown and not lenient:
        raise _unknown(unknown, model)
    if failed is not None:
        raise _refusal(failed, spelt)
    return body, len(unknown)


def _renamed(content: Mapping[str, Any], model: type[Body]) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Fields by the model's names, the unknown ones, and how the caller spelt those that were renamed."""
    given, spelt, unknown = dict[str, Any](), dict[str, str](), list[str]()
    for name, said, value in _named(content, model):
        if value is None:
            continue
        if name in model.model_fields:
            if name in given and given[name] != value:
                first = spelt.get(name, name)
                raise invalid(said, f"it says {shown(value)}, {first} {shown(given[name])}; give one of them.")
            given[name] = value
            spelt[name] = said
        elif name in NEUTRAL:
            values, why = NEUTRAL[name]
            if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values):
                raise unsupported(said, why)
        else:
            unknown.append(said)
    return given, unknown, spelt


def _named(content: Mapping[str, Any], model: type[Body]) -> Iterator[tuple[str, str, Any]]:
    """Each field: its name here, its name as it came, and its value."""
    for name, value in content.items():
        if name == "structured_outputs" and isinstance(value, dict):
            for part, within in value.items():
                said = f"{name}.{part[:64]}"
                if part == "json_object":
                    yield "json_schema", said, {"type": "object"} if within is True else None
                else:
                    yield _STRUCTURED.get(part, said), said, within
        elif name in model.model_fields:
            yield name, name, value
        else:
            own = HTTP_NAMES.get(name, name)
            yield model.other_names.get(own, own), name, value


def _unknown(names: list[str], model: type[Body]) -> ApiError:
    """The refusal of unknown fields, with the nearest known one."""
    served = {*model.model_fields, *(name for name, own in HTTP_NAMES.items() if own in model.model_fields)}
    near = nearest(names[0], sorted(served))
    listed = ", ".join(name[:64] for name in names[:_SHOWN])
    how = f"did you mean {near!r}?" if near else "remove it." if len(names) == 1 else "remove them."
    fields = "unknown field" if len(names) == 1 else "unknown fields"
    return ApiError(f"{fields}: {listed}; {how}", code="unknown_parameter", param=names[0][:64])


def _refusal(fault: Any, spelt: Mapping[str, str]) -> ApiError:
    first, *rest = [str(part)[:64] for part in fault["loc"] if isinstance(part, str) and part != "[key]"]
    param = ".".join([spelt.get(first, first), *rest])
    words = _WORDS.get(fault["type"])
    why = fault["msg"] if words is None else words.format(value=shown(fault["input"]), **fault.get("ctx", {}))
    if fault["type"] == "unsupported":
        return unsupported(param, why)
    return invalid(param, why, code=_CODES.get(fault["type"], "invalid_value"))
