"""What answers look like, for the OpenAPI document.

Answers are written piece by piece elsewhere; tests hold them to these types.
"""

from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


class PromptDetails(msgspec.Struct, kw_only=True):
    """Tokens of a prompt, taken apart."""

    cached_tokens: int


class CompletionDetails(msgspec.Struct, kw_only=True):
    """Tokens of an answer, taken apart."""

    reasoning_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    near_ties: int


class CompletionUsage(msgspec.Struct, kw_only=True):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    qnext: dict[str, Any] | None = None


class FunctionCall(msgspec.Struct, kw_only=True):
    """A function and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCallShape(msgspec.Struct, kw_only=True):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AnswerMessage(msgspec.Struct, kw_only=True):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallShape] | None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage


class TextChoice(msgspec.Struct, kw_only=True):
    """One continuation."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "cancelled"]


class TextCompletion(msgspec.Struct, kw_only=True):
    """Continuations of plain texts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: CompletionUsage


class ResponseUsage(msgspec.Struct, kw_only=True):
    """Token counts."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: PromptDetails
    output_tokens_details: CompletionDetails
    qnext: dict[str, Any] | None = None


class OutputItem(msgspec.Struct, kw_only=True):
    """A message, a stretch of reasoning or a call."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Literal["completed", "incomplete", "in_progress"]
    role: Literal["assistant"] | None = None
    content: list[dict[str, Any]] | None = None
    summary: list[dict[str, Any]] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class ResponseObject(msgspec.Struct, kw_only=True):
    """An answer made of items."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete", "cancelled", "failed", "in_progress"]
    output: list[OutputItem]
    usage: ResponseUsage | None
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None


class DeletedResponse(msgspec.Struct, kw_only=True):
    """A response that is not kept any more."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class MessageUsage(msgspec.Struct, kw_only=True):
    """Token counts; tokens read from the cache are not among the input tokens."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int


class MessageBlock(msgspec.Struct, kw_only=True):
    """A text, a stretch of thinking or a call."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class MessageObject(msgspec.Struct, kw_only=True):
    """An answer made of blocks."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "pause_turn"]
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(msgspec.Struct, kw_only=True):
    """Tokens of a conversation."""

    input_tokens: int


class Tokens(msgspec.Struct, kw_only=True):
    """A text in tokens."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class Text(msgspec.Struct, kw_only=True):
    """The text of tokens."""

    prompt: str


class ModelCard(msgspec.Struct, kw_only=True):
    """The served model under one of its names."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    """All names of the served model."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(msgspec.Struct, kw_only=True):
    """Whether requests are taken, and how busy the engine is."""

    status: Literal["ok", "draining", "stopped"]
    model: str
    running: int
    waiting: int
    unfinished: int
    background_prefill: dict[str, int]
    kernels: list[str]


class CacheExplanations(msgspec.Struct, kw_only=True):
    """What was reused of the last prompts, and sums over all."""

    requests: list[dict[str, Any]]
    counts: dict[str, int]


class Inspection(msgspec.Struct, kw_only=True):
    """Inside an answer: its tokens, the experts of every token and sparse layer, its memory."""

    id: str
    prompt_tokens: int
    completion_tokens: int
    tokens: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    num_experts: int
    experts_per_token: int
    routes: list[list[list[int]]]
    memory: dict[str, float]


class ErrorDetail(msgspec.Struct, kw_only=True):
    """What is wrong, and where."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, kw_only=True):
    """An error in OpenAI's shape."""

    error: ErrorDetail


class AnthropicErrorDetail(msgspec.Struct, kw_only=True):
    """What is wrong."""

    type: str
    message: str


class AnthropicErrorBody(msgspec.Struct, kw_only=True):
    """An error in Anthropic's shape."""

    type: Literal["error"]
    error: AnthropicErrorDetail
