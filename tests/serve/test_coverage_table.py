"""The table of fields in the document is complete: for the server and for the official clients."""

import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from msgspec.structs import fields
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from qnext.serve.api.chat import ChatRequest
from qnext.serve.api.completions import CompletionRequest
from qnext.serve.api.messages import CountRequest, MessagesRequest
from qnext.serve.api.responses import ResponsesRequest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
ROUTES = {
    "/v1/chat/completions": (ChatRequest, chat_create_params.CompletionCreateParamsStreaming),
    "/v1/completions": (
        CompletionRequest, completion_create_params.CompletionCreateParamsStreaming,
    ),
    "/v1/responses": (ResponsesRequest, response_create_params.ResponseCreateParamsStreaming),
    "/v1/messages": (MessagesRequest, message_create_params.MessageCreateParamsStreaming),
    "/v1/messages/count_tokens": (
        CountRequest, message_count_tokens_params.MessageCountTokensParams,
    ),
}  # fmt: skip


def rows() -> dict[tuple[str, str], set[str]]:
    """(route, kind) -> the fields the document names."""
    text = DOCUMENT.read_text(encoding="utf-8")
    found = re.findall(r"^\| `(/v1/[\w/]+)` \| (\w+) \| (.+) \|$", text, re.MULTILINE)
    return {
        (route, kind): {name.partition(".")[0] for name in re.findall(r"`([a-z_.]+)`", cell)}
        for route, kind, cell in found
    }


@pytest.mark.parametrize("route", ROUTES)
def test_the_document_names_every_field_with_its_kind(route) -> None:
    kind, _ = ROUTES[route]
    named = rows()
    assert named[route, "supported"] == {field.encode_name for field in fields(kind)}
    assert named.get((route, "ignored"), set()) == set(kind.IGNORED)
    assert named.get((route, "refused"), set()) == set(kind.REFUSED)


@pytest.mark.parametrize("route", ROUTES)
def test_every_field_of_the_official_client_has_a_kind(route) -> None:
    kind, params = ROUTES[route]
    known = {field.encode_name for field in fields(kind)} | set(kind.IGNORED) | set(kind.REFUSED)
    hints: dict[str, Any] = get_type_hints(params, include_extras=True)
    assert set(hints) - known == set()


def test_a_field_has_one_kind() -> None:
    for kind, _ in ROUTES.values():
        names = {field.encode_name for field in fields(kind)}
        assert not names & kind.IGNORED
        assert not names & kind.REFUSED.keys()
        assert not kind.IGNORED & kind.REFUSED.keys()
