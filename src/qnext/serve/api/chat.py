"""``POST /v1/chat/completions``: OpenAI's conversations."""

from typing import Any, Literal

import msgspec

from qnext.answers import Delta
from qnext.errors import RequestError
from qnext.llm import LLM
from qnext.serve.api.fields import (
    Head,
    Pairs,
    Sampling,
    StreamOptions,
    template_options,
)
from qnext.serve.api.gathered import Gathered, LogprobsText, usage_body
from qnext.serve.events import DONE, event
from qnext.serve.refusals import ApiError

MAX_TOP_LOGPROBS = 20


class ContentPart(msgspec.Struct, kw_only=True):
    """A part of a message; this model reads text only."""

    type: Literal["text"]
    text: str


class CalledFunction(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What an assistant's message called."""

    name: str
    arguments: str | dict[str, Any]


class MessageToolCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool call inside an assistant's message."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None


class ChatMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One message of a conversation; ``developer`` is what newer clients call ``system``."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # What the official client sends back when an answer becomes part of the conversation.
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    def for_template(self) -> dict[str, Any]:
        """The message as templates know it."""
        found = msgspec.to_builtins(self)
        for name in ("annotations", "refusal", "audio", "function_call"):
            found.pop(name, None)
        if self.role == "developer":
            found["role"] = "system"
        for call in found.get("tool_calls") or ():
            call.pop("index", None)
        found.setdefault("content", None)
        return found


class ChatRequest(Sampling, kw_only=True):
    """A conversation to answer."""

    IGNORED = frozenset(
        {
            "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
            "prompt_cache_options", "prompt_cache_retention", "parallel_tool_calls", "verbosity",
        }
    )  # fmt: skip
    REFUSED = {  # noqa: RUF012
        "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
        "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
        "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (),
        "moderation": (), "use_beam_search": (False,), "guided_json": (), "guided_regex": (),
        "guided_choice": (), "guided_grammar": (), "thinking_budget": (), "reasoning_effort": (),
    }  # fmt: skip

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    def limit(self) -> int | None:
        """Most tokens to generate, from either spelling."""
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise RequestError(
                f"max_tokens: {old} contradicts max_completion_tokens ({new}); give one of them."
            )
        return old if new is None else new

    def prepare(self, llm: LLM) -> Pairs:
        """The requests that answer it. Raises QnextError for what cannot be answered."""
        options, thinks = template_options(self.chat_template_kwargs, self.enable_thinking, None)
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise RequestError(
                    "add_generation_prompt: a new turn contradicts continue_final_message."
                )
            options["continue_final_message"] = True
        elif self.add_generation_prompt is False:
            options["add_generation_prompt"] = False
        params = self.params(llm, logprobs=self._wanted_logprobs())
        return llm.choices(
            *llm.prepare_chat(
                [message.for_template() for message in self.messages],
                params,
                enable_thinking=thinks,
                template_options=options,
            )
        )

    def writer(self, llm: LLM, head: Head) -> "ChatWriter":
        """Writes the answer."""
        return ChatWriter(self, llm, head)

    def _wanted_logprobs(self) -> int | None:
        top = self.top_logprobs
        if not self.logprobs:
            if top:
                raise RequestError("top_logprobs: needs logprobs: true.")
            return None
        if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
            raise RequestError(f"top_logprobs: expected 0 to {MAX_TOP_LOGPROBS}, found {top}.")
        return top or 0


class ChatWriter:
    """One chat completion."""

    def __init__(self, asked: ChatRequest, llm: LLM, head: Head) -> None:
        self._choices = [Gathered() for _ in range(asked.n or 1)]
        self._explain = asked.wants_explanation()
        options = asked.stream_options or StreamOptions()
        self._usage = bool(options.include_usage)
        self._always = self._usage and bool(options.continuous_usage_stats)
        hidden = () if asked.ignore_eos else (*llm.eos_ids, *(asked.stop_token_ids or ()))
        self._logprobs = LogprobsText(llm.tokenizer, hidden) if asked.logprobs else None
        self._head = head
        self._chunk_head = {
            "id": head.id, "object": "chat.completion.chunk", "created": head.created,
            "model": head.model,
        }  # fmt: skip

    def take(self, index: int, delta: Delta) -> None:
        """Note a delta."""
        self._choices[index].take(delta)

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        return {
            "id": self._head.id,
            "object": "chat.completion",
            "created": self._head.created,
            "model": self._head.model,
            "choices": [self._choice(i, found) for i, found in enumerate(self._choices)],
            "usage": self._counts(),
        }

    def opening(self) -> bytes:
        """One chunk per choice that says whose turn it is."""
        return b"".join(
            self._chunk(index, {"role": "assistant", "content": ""}, None)
            for index in range(len(self._choices))
        )

    def piece(self, index: int, delta: Delta) -> bytes:
        """Chunks of one delta: text first, then the reason the answer ended."""
        self.take(index, delta)
        parts = {}
        if delta.reasoning:
            parts["reasoning_content"] = delta.reasoning
        if delta.text:
            parts["content"] = delta.text
        events = b""
        if parts or (self._logprobs is not None and delta.logprobs):
            events = self._chunk(index, parts, None, delta)
        if delta.finish_reason is not None:
            events += self._chunk(index, {}, delta.finish_reason)
        return events

    def closing(self) -> bytes:
        """The usage, where it was asked for, and the end."""
        if not self._usage:
            return DONE
        return event({**self._chunk_head, "choices": [], "usage": self._counts()}) + DONE

    def failure(self, error: ApiError) -> bytes:
        """An error is the last event."""
        return event(error.body())

    def _counts(self) -> dict[str, Any]:
        return usage_body(self._choices, per_prompt=len(self._choices), explain=self._explain)

    def _choice(self, index: int, found: Gathered) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": found.text}
        if found.reasoning:
            message["reasoning_content"] = found.reasoning
        logprobs = None
        if self._logprobs is not None:
            logprobs = {"content": self._logprobs.content(found.logprobs), "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": found.finish_reason,
        }

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: str | None, source: Delta | None = None
    ) -> bytes:
        logprobs = None
        if self._logprobs is not None and source is not None:
            logprobs = {"content": self._logprobs.content(source.logprobs), "refusal": None}
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._chunk_head, "choices": [choice]}
        if self._always:
            chunk["usage"] = self._counts()
        elif self._usage:
            chunk["usage"] = None
        return event(chunk)
