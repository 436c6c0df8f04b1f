"""`GET /openapi.json`: the API described by the tables that check it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from polar_server.endpoints import account
from polar_server.openai import chat, completions, responses

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polar_server.openai.fields import Field

_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_READS: Final = {
    "/v1/models": "The models and tiers that a request may name.",
    "/v1/models/{model}": "One of them.",
    "/v1/polar/quote": "What a request of so many tokens would cost at most, by tier.",
    "/v1/polar/usage": "What the caller's tenant has used and spent.",
    "/v1/polar/receipts/{id}": "The receipt of one request of the caller's tenant.",
    "/health": "Whether the process runs.",
    "/ready": "Whether requests should come here now.",
    "/metrics": "What the server did, in Prometheus' text format.",
    "/version": "Versions of the package and of the engine's arithmetic.",
    "/openapi.json": "This document.",
}


def document(version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    paths: dict[str, Any] = {
        "/v1/chat/completions": _post("Answer messages.", "chat.completion", chat.FIELDS, ["model", "messages"]),
        "/v1/responses": _post("Answer items, statelessly.", "response", responses.FIELDS, ["model", "input"]),
        "/v1/completions": _post("Continue a text.", "text_completion", completions.FIELDS, ["model", "prompt"]),
    }
    for path, summary in _READS.items():
        paths[path] = {"get": {"summary": summary, "responses": _responses("application/json")}}
    for path, name in (("/v1/models/{model}", "model"), ("/v1/polar/receipts/{id}", "id")):
        paths[path]["parameters"] = [_parameter(name, "path", "string")]
    paths["/v1/polar/quote"]["get"]["parameters"] = [_parameter(name, "query", "integer") for name in account.NUMBERS]
    paths["/v1/polar/usage"]["get"]["parameters"] = [
        _parameter(name, "query", "string", required=False) for name in account.USAGE
    ]
    paths["/v1/polar/quote"]["post"] = {
        "summary": "What the request in the body would cost at most, as it is and by tier.",
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}},
        "responses": _responses("application/json"),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "PoLar", "version": version},
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }


def _parameter(name: str, place: str, kind: str, *, required: bool = True) -> dict[str, Any]:
    return {"name": name, "in": place, "required": required, "schema": {"type": kind}}


def _post(summary: str, kind: str, table: Mapping[str, Field], required: list[str]) -> dict[str, Any]:
    properties = {name: dict(field.schema) for name, field in table.items()}
    schema = {"type": "object", "required": required, "properties": properties}
    return {
        "post": {
            "summary": summary,
            "operationId": kind,
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            "responses": _responses("application/json", "text/event-stream"),
        }
    }


def _responses(*kinds: str) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "200": {"description": "Answered.", "content": {kind: {} for kind in kinds}},
        "default": {"description": "Refused or failed.", "content": error},
    }
