"""``POST /v1/chat/completions``: OpenAI's conversations."""

import secrets
from typing import Any, Literal

import msgspec

from qnext.answers import Delta
from qnext.engine.request import StructuredOutputs
from qnext.errors import RequestError
from qnext.llm import LLM
from qnext.serve.api.fields import (
    Effort,
    Head,
    Pairs,
    ResponseFormat,
    Sampling,
    StreamOptions,
    Tool,
    Turn,
    template_options,
    thinking_budget,
)
from qnext.serve.api.gathered import Gathered, LogprobsText, usage_body
from qnext.serve.events import DONE, event
from qnext.serve.refusals import ApiError
from qnext.text.calls.parts import CallArguments, CallStart, Part, Piece

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


class NamedFunction(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A function by its name."""

    name: str


class NamedChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The one function that must be called."""

    function: NamedFunction
    type: Literal["function"] = "function"


class ChatRequest(Sampling, kw_only=True):
    """A conversation to answer."""

    IGNORED = frozenset(
        {
            "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
            "prompt_cache_options", "prompt_cache_retention", "verbosity",
        }
    )  # fmt: skip
    REFUSED = {  # noqa: RUF012
        "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],),
        "audio": (), "prediction": (), "web_search_options": (), "moderation": (),
        "use_beam_search": (False,),
    }  # fmt: skip

    LABORIOUS = frozenset(
        {
            "tools", "response_format", "guided_json", "guided_regex", "guided_choice",
            "guided_grammar", "n",
        }
    )  # fmt: skip

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    thinking_budget: int | None = None
    reasoning_effort: Effort | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

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
        budget = thinking_budget(self.thinking_budget, self.reasoning_effort)
        options, thinks = template_options(self.chat_template_kwargs, self.enable_thinking, budget)
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise RequestError(
                    "add_generation_prompt: a new turn contradicts continue_final_message."
                )
            options["continue_final_message"] = True
        elif self.add_generation_prompt is False:
            options["add_generation_prompt"] = False
        return Turn(
            messages=[message.for_template() for message in self.messages],
            params=self.params(
                llm,
                logprobs=self._wanted_logprobs(),
                thinking_budget=budget,
                structured_outputs=self._form(),
            ),
            tools=[tool.for_template() for tool in self.tools or ()],
            tool_choice=self._choice(),
            parallel=self.parallel_tool_calls is not False,
            enable_thinking=thinks,
            options=options,
        ).pairs(llm)

    def _form(self) -> StructuredOutputs | None:
        """The form the answer must have, from OpenAI's field or those of other servers."""
        found = {
            "response_format": self.response_format and self.response_format.form(),
            "guided_json": self.guided_json is not None
            and StructuredOutputs(json_schema=self.guided_json),
            "guided_regex": self.guided_regex is not None
            and StructuredOutputs(regex=self.guided_regex),
            "guided_choice": self.guided_choice is not None
            and StructuredOutputs(choice=tuple(self.guided_choice)),
            "guided_grammar": self.guided_grammar is not None
            and StructuredOutputs(grammar=self.guided_grammar),
        }
        given = [name for name, value in found.items() if value]
        if len(given) > 1:
            raise RequestError(f"{given[1]}: contradicts {given[0]}; give one of them.")
        return found[given[0]] or None if given else None

    def _choice(self) -> str | dict[str, Any]:
        if isinstance(self.tool_choice, NamedChoice):
            return {"name": self.tool_choice.function.name}
        return self.tool_choice or "auto"

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
        self._call_ids: dict[tuple[int, int], str] = {}
        """(choice, number of the call) -> its id."""
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
        """Chunks of one delta: its parts in order, then the reason the answer ended."""
        self.take(index, delta)
        events, source = b"", delta
        for part in delta.parts:
            found = self._part(index, part)
            if found is not None:
                # The tokens of a step belong together; they go with its first part.
                events += self._chunk(index, found, None, source)
                source = None
        if source is not None and self._logprobs is not None and delta.logprobs:
            events += self._chunk(index, {}, None, source)
        if delta.finish_reason is not None:
            events += self._chunk(index, {}, self._reason(self._choices[index]))
        return events

    def _part(self, index: int, part: Part) -> dict[str, Any] | None:
        """What a part adds to the message; None for nothing."""
        match part:
            case Piece("reasoning", text):
                return {"reasoning_content": text}
            case Piece(_, text):
                return {"content": text}
            case CallStart(number, name):
                call = {
                    "index": number, "id": self._call_id(index, number), "type": "function",
                    "function": {"name": name, "arguments": ""},
                }  # fmt: skip
                return {"tool_calls": [call]}
            case CallArguments(number, text):
                return {"tool_calls": [{"index": number, "function": {"arguments": text}}]}
        return None

    def _call_id(self, index: int, number: int) -> str:
        return self._call_ids.setdefault((index, number), f"call_{secrets.token_hex(12)}")

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
        output = found.output
        calls = [
            {"id": self._call_id(index, number), **call.as_message()}
            for number, call in enumerate(output.tool_calls)
        ]
        content = output.content if output.content or not calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if output.reasoning:
            message["reasoning_content"] = output.reasoning
        if calls:
            message["tool_calls"] = calls
        logprobs = None
        if self._logprobs is not None:
            logprobs = {"content": self._logprobs.content(found.logprobs), "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self._reason(found),
        }

    @staticmethod
    def _reason(found: Gathered) -> str | None:
        return (
            "tool_calls"
            if found.finish_reason == "stop" and found.has_called
            else found.finish_reason
        )

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
