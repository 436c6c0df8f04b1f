"""Structured output: a model that answers with objects of a schema.

An answer that was cut off is an error, never half an object.
"""

from __future__ import annotations

import json
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.exceptions import OutputParserException
from langchain_core.output_parsers import BaseCumulativeTransformOutputParser
from langchain_core.outputs import ChatGeneration
from langchain_core.runnables import RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.json import parse_partial_json
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel

from langchain_polar.errors import langchain_errors
from polar_sdk.errors import IncompleteAnswerError, InvalidRequestError
from polar_sdk.reading import ANSWER_DIGITS, Unreadable, parse_json
from polar_sdk.request.constraint import closed, json_schema

if TYPE_CHECKING:
    from collections.abc import Mapping

    from langchain_core.language_models import BaseChatModel
    from langchain_core.language_models.base import LanguageModelInput
    from langchain_core.messages import AIMessage
    from langchain_core.outputs import Generation
    from langchain_core.runnables import Runnable


Method = Literal["json_schema", "function_calling", "json_mode"]


def structured(
    model: BaseChatModel,
    schema: dict[str, Any] | type,
    *,
    method: Method,
    include_raw: bool,
    options: Mapping[str, Any],
) -> Runnable[LanguageModelInput, Any]:
    """A model that answers with objects of a schema; see `ChatPolar.with_structured_output`."""
    traced = {"kwargs": {"method": method}, "schema": schema}
    if method == "function_calling":
        tool = openai_tool(schema)
        name = tool["function"]["name"]
        bound = model.bind_tools([tool], tool_choice=name, ls_structured_output_format=traced, **options)
    elif method in ("json_schema", "json_mode"):
        bound = model.bind(response_format=_format(schema, method), ls_structured_output_format=traced, **options)
    else:
        with langchain_errors():
            raise InvalidRequestError(f"method={method!r} is unknown; use json_schema, function_calling or json_mode.")
    parser = AnswerParser(pydantic=schema if isinstance(schema, type) and is_basemodel_subclass(schema) else None)
    if not include_raw:
        return bound | parser
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=bound) | parsed.with_fallbacks([failed], exception_key="parsing_error")


def _format(schema: dict[str, Any] | type, method: Method) -> dict[str, Any]:
    if _is_pydantic(schema):
        read = json_schema(schema)
    else:
        read = convert_to_json_schema(schema)
        if isinstance(schema, type):
            read = closed(read)
    if method == "json_mode":
        return {"type": "json_object", "schema": read}
    return {"type": "json_schema", "json_schema": {"name": read.get("title") or "answer", "schema": read}}


def openai_tool(tool: Any) -> dict[str, Any]:
    """A tool in OpenAI's form; where LangChain has a pydantic class, with the schema that this class has itself.

    LangChain's own conversion drops the part of a class that refers to the class.
    """
    read = convert_to_openai_tool(tool)
    arguments = getattr(tool, "tool_call_schema", tool)
    if _is_pydantic(arguments):
        read["function"]["parameters"] = {
            name: value for name, value in json_schema(arguments).items() if name not in {"title", "description"}
        }
    return read


def _is_pydantic(schema: Any) -> bool:
    """Whether it is a class of pydantic 2."""
    return isinstance(schema, type) and issubclass(schema, BaseModel)


class AnswerParser(BaseCumulativeTransformOutputParser[Any]):
    """Reads the object of an answer, be it JSON text or the arguments of a call.

    While an answer streams it yields what is there of a mapping, and of a pydantic object nothing before it is whole.
    """

    pydantic: Any = None
    """The pydantic class; None = mappings."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """The object.

        Raises:
            OutputParserException: The answer was cut off, or the class refuses what the schema allows.
        """
        generation = result[0]
        if not isinstance(generation, ChatGeneration):
            return self.parse(generation.text)
        message: Any = generation.message
        text = _json_of(message)
        if partial and "finish_reason" not in message.response_metadata:
            return self._part(text)
        if message.response_metadata.get("complete") is False:
            raise _incomplete(text, message)
        return self._whole(text, message)

    def parse(self, text: str) -> Any:
        """The object that a text holds."""
        return self._whole(text, None)

    def _part(self, text: str) -> Any:
        if self.pydantic is not None:
            return None
        try:
            found = parse_partial_json(text)
        except ValueError:
            return None
        return found if isinstance(found, dict) and found else None

    def _whole(self, text: str, message: Any) -> Any:
        try:
            found = parse_json(text, max_digits=ANSWER_DIGITS)
        except Unreadable:
            raise _incomplete(text, message) from None
        if self.pydantic is None:
            return found
        try:
            read = getattr(self.pydantic, "model_validate", None) or self.pydantic.parse_obj  # of pydantic 1
            return read(found)
        except ValueError as error:
            raise OutputParserException(
                f"{self.pydantic.__name__} refuses the answer {text[:200]!r}: {error}", llm_output=text
            ) from error


def _json_of(message: AIMessage) -> str:
    chunks: Any = getattr(message, "tool_call_chunks", None)
    if chunks:
        return str(chunks[0].get("args") or "")
    if message.tool_calls:
        return json.dumps(message.tool_calls[0]["args"])
    return str(message.text)


def _incomplete(text: str, message: Any) -> Exception:
    reason = "" if message is None else f" (finish_reason={message.response_metadata.get('finish_reason')})"
    try:
        with langchain_errors():
            raise IncompleteAnswerError(
                f"the answer is not complete JSON{reason}: {text[-60:]!r}.",
                hint="Raise max_tokens, or remove the stop string.",
                text=text,
            )
    except IncompleteAnswerError as error:
        return error
