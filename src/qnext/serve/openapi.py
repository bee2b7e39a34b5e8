"""``GET /openapi.json``: the interface in OpenAPI 3.1, made from the types requests have."""

from dataclasses import dataclass, replace
from typing import Any

import msgspec

from qnext import __version__
from qnext.serve.api import shapes
from qnext.serve.api.chat import ChatRequest
from qnext.serve.api.completions import CompletionRequest
from qnext.serve.api.messages import CountRequest, MessagesRequest
from qnext.serve.api.responses import ResponsesRequest
from qnext.serve.api.tokens import DetokenizeRequest, TokenizeRequest
from qnext.serve.reading import RequestBody
from qnext.serve.refusals import shape_of

JSON = "application/json"
_REFUSALS = {
    "400": "The request is wrong, or not possible here",
    "401": "No key, or a wrong one",
    "403": "The server does not go by this name",
    "404": "There is no such model, nothing at this address, or nothing kept under this id",
    "413": "The body is too large",
    "415": "The body is not JSON",
    "429": "Too many requests wait already; Retry-After says when to try again",
    "503": "The server is being stopped, or its engine has ended",
    "504": "The answer took longer than the server allows",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """A route."""

    summary: str
    answer: type | None = None
    """None for an answer that is not JSON."""
    body: type[RequestBody] | None = None
    streams: bool = False
    query: tuple[tuple[str, dict[str, Any], str], ...] = ()
    """(name, schema, description) of parameters."""
    deleted: type | None = None
    """The answer of DELETE at the same address; None where there is nothing to delete."""
    media_type: str = JSON
    refusals: tuple[str, ...] = ("401", "403")


_POSTED = ("400", "401", "403", "404", "413", "415")
_RUN = (*_POSTED, "429", "503", "504")
OPERATIONS: dict[str, Operation] = {
    "/v1/chat/completions": Operation(
        summary="Answer a conversation", body=ChatRequest, answer=shapes.ChatCompletion,
        streams=True, refusals=_RUN,
    ),
    "/v1/completions": Operation(
        summary="Continue plain texts", body=CompletionRequest, answer=shapes.TextCompletion,
        streams=True, refusals=_RUN,
    ),
    "/v1/responses": Operation(
        summary="Answer items", body=ResponsesRequest, answer=shapes.ResponseObject,
        streams=True, refusals=_RUN,
    ),
    "/v1/responses/{id}": Operation(
        summary="A response that is kept", answer=shapes.ResponseObject,
        deleted=shapes.DeletedResponse, refusals=("400", "401", "403", "404"),
    ),
    "/v1/messages": Operation(
        summary="Answer a conversation of Anthropic's clients", body=MessagesRequest,
        answer=shapes.MessageObject, streams=True, refusals=_RUN,
    ),
    "/v1/messages/count_tokens": Operation(
        summary="Count the tokens of a conversation", body=CountRequest,
        answer=shapes.TokenCount, refusals=_POSTED,
    ),
    "/v1/models": Operation(summary="The served model", answer=shapes.ModelList),
    "/v1/models/{model}": Operation(
        summary="The served model by name", answer=shapes.ModelCard,
        refusals=("401", "403", "404"),
    ),
    "/tokenize": Operation(
        summary="Text or conversation to token ids", body=TokenizeRequest, answer=shapes.Tokens,
        refusals=_POSTED,
    ),
    "/detokenize": Operation(
        summary="Token ids to text", body=DetokenizeRequest, answer=shapes.Text,
        refusals=_POSTED,
    ),
    "/health": Operation(
        summary="Whether requests are taken", answer=shapes.Health, refusals=("403", "503")
    ),
    "/metrics": Operation(summary="Counters for Prometheus", media_type="text/plain"),
    "/cache/explain": Operation(
        summary="What was reused of the last prompts and why not more",
        answer=shapes.CacheExplanations,
        query=(
            ("request", {"type": "string"}, "Id of an answer"),
            ("last", {"type": "integer", "minimum": 0}, "How many, newest first"),
        ),
        refusals=("400", "401", "403", "404"),
    ),
    "/inspect/{id}": Operation(
        summary="Inside an answer that was asked for with qnext.inspect",
        answer=shapes.Inspection, refusals=("400", "401", "403", "404", "503"),
    ),
}  # fmt: skip


def document() -> dict[str, Any]:
    """The OpenAPI document of the server."""
    types = [
        one for each in OPERATIONS.values() for one in (each.body, each.answer, each.deleted) if one
    ]
    types += [shapes.ErrorBody, shapes.AnthropicErrorBody]
    references, schemas = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    named = dict(zip(types, references, strict=True))
    for each in OPERATIONS.values():
        if each.body is not None:
            _close(schemas[each.body.__name__], each.body)
    paths = {
        path: {"post" if each.body else "get": _operation(path, each, named)}
        for path, each in OPERATIONS.items()
    }
    for path, each in OPERATIONS.items():
        if each.deleted is not None:
            removal = replace(each, summary="Forget it", answer=each.deleted)
            found = _operation(path, removal, named)
            paths[path]["delete"] = {**found, "operationId": f"delete_{found['operationId']}"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "qnext", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"bearer": []}, {"key": []}],
    }


def _close(schema: dict[str, Any], body: type[RequestBody]) -> None:
    """Only named fields are accepted; the ignored and refused ones are named too."""
    properties = schema.setdefault("properties", {})
    for name in sorted(body.IGNORED):
        properties[name] = {"description": "Accepted and without effect."}
    for name, neutral in sorted(body.REFUSED.items()):
        properties[name] = {"enum": [None, *neutral], "description": "Not available here."}
    schema["additionalProperties"] = False


def _operation(path: str, each: Operation, named: dict[type, Any]) -> dict[str, Any]:
    shape = shapes.AnthropicErrorBody if shape_of(path) == "anthropic" else shapes.ErrorBody
    content: dict[str, Any] = {each.media_type: {}}
    if each.answer is not None:
        content = {JSON: {"schema": named[each.answer]}}
    if each.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    answers = {"200": {"description": each.summary, "content": content}}
    for status in each.refusals:
        # An engine that has ended says so in the usual words.
        is_health = path == "/health" and status == "503"
        failed = named[shapes.Health if is_health else shape]
        answers[status] = {"description": _REFUSALS[status], "content": {JSON: {"schema": failed}}}
    found: dict[str, Any] = {
        "summary": each.summary,
        "operationId": path.strip("/").replace("/", "_").replace("{", "").replace("}", ""),
        "responses": answers,
    }
    if each.body is not None:
        found["requestBody"] = {"required": True, "content": {JSON: {"schema": named[each.body]}}}
    parameters = [
        {"name": name, "in": "query", "required": False, "schema": schema, "description": words}
        for name, schema, words in each.query
    ]
    if "{" in path:
        name = path[path.index("{") + 1 : path.index("}")]
        parameters.append(
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        )
    if parameters:
        found["parameters"] = parameters
    return found
