"""``POST /v1/responses``: OpenAI's newer interface. ``kept.py`` is the server's memory of it."""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from qnext.engine.request import StructuredOutputs
from qnext.errors import RequestError
from qnext.llm import LLM
from qnext.serve.api.fields import (
    Effort,
    Head,
    Pairs,
    QnextOptions,
    ResponseFormat,
    Turn,
    function_tool,
    stop_strings,
    template_options,
    thinking_budget,
)
from qnext.serve.api.fields import JsonSchema as NamedSchema
from qnext.serve.api.responses_writer import ResponseWriter
from qnext.serve.reading import RequestBody

LOGPROBS = "message.output_text.logprobs"


class InputPart(msgspec.Struct, kw_only=True):
    """A part of an item; this model reads text only."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal"]
    text: str = ""
    refusal: str = ""


class InputItem(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A message, or what a message consists of: reasoning, a call, the result of a call."""

    type: Literal["message", "reasoning", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[InputPart] | None = None
    summary: list[InputPart] | None = None
    name: str | None = None
    arguments: str | None = None
    call_id: str | None = None
    output: str | list[InputPart] | None = None


class FunctionTool(msgspec.Struct, kw_only=True):
    """A function the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The one function that must be called."""

    type: Literal["function"]
    name: str


class TextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How the text is to be; ``verbosity`` has no effect."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(msgspec.Struct, kw_only=True):
    """How much to think; the reasoning is returned as it is, so ``summary`` has no effect."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseStreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Accepted and without effect: this server pads nothing."""

    include_obfuscation: bool | None = None


class ResponsesRequest(RequestBody, kw_only=True):
    """Items to answer."""

    IGNORED = frozenset(
        {
            "user", "service_tier", "safety_identifier", "prompt_cache_key",
            "prompt_cache_options", "prompt_cache_retention", "max_tool_calls",
            "access_programs",
        }
    )  # fmt: skip
    REFUSED = {  # noqa: RUF012
        "background": (False,), "background_options": (), "context_management": ([],),
        "conversation": (), "image": (), "moderation": (), "prompt": (),
        "truncation": ("disabled",),
    }  # fmt: skip

    LABORIOUS = frozenset({"tools", "text", "previous_response_id"})

    input: str | list[InputItem]
    previous_response_id: str | None = None
    store: bool | None = None
    """Whether the answer can be gone on from and asked for again; true when left out."""
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = (
        None
    )
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, str] | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    thinking_budget: int | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    qnext: QnextOptions | None = None

    def items(self) -> list[InputItem]:
        """The input as items."""
        if isinstance(self.input, str):
            return [InputItem(role="user", content=self.input)]
        return self.input

    def go_on_from(self, earlier: Sequence[InputItem]) -> None:
        """Put the items of an earlier conversation first. Raises RequestError naming an own one.

        The earlier instructions are not carried over: those of this request come first.
        """
        self.messages()  # while the own items still have their own numbers
        self.input = [*earlier, *self.items()]

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as templates know it. Raises RequestError naming an item."""
        found: list[dict[str, Any]] = []
        if self.instructions is not None:
            found.append({"role": "system", "content": self.instructions})
        reasoning = ""
        for index, item in enumerate(self.items()):
            where = f"input[{index}]"
            if item.type == "reasoning":
                parts = item.content if isinstance(item.content, list) else item.summary or []
                reasoning += "".join(part.text for part in parts)
            elif item.type == "function_call_output":
                content = _text(_needed(item.output, f"{where}.output"))
                call_id = _needed(item.call_id, f"{where}.call_id")
                found.append({"role": "tool", "content": content, "tool_call_id": call_id})
            elif item.type == "function_call":
                call = {
                    "name": _needed(item.name, f"{where}.name"),
                    "arguments": _needed(item.arguments, f"{where}.arguments"),
                }
                message = _answering(found, reasoning)
                reasoning = ""
                message.setdefault("tool_calls", []).append(
                    {"id": item.call_id, "type": "function", "function": call}
                )
            else:
                role = _needed(item.role, f"{where}.role")
                content = _text(_needed(item.content, f"{where}.content"))
                if role == "assistant":
                    message = _answering(found, reasoning)
                    reasoning = ""
                    message["content"] = (message["content"] or "") + content
                else:
                    role = "system" if role == "developer" else role
                    found.append({"role": role, "content": content})
        return found

    def prepare(self, llm: LLM) -> Pairs:
        """The request that answers it. Raises QnextError for what cannot be answered."""
        effort = self.reasoning.effort if self.reasoning else None
        budget = thinking_budget(self.thinking_budget, effort)
        options, thinks = template_options(self.chat_template_kwargs, self.enable_thinking, budget)
        plain = (
            "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty",
            "presence_penalty", "frequency_penalty",
        )  # fmt: skip
        given = {name: getattr(self, name) for name in plain if getattr(self, name) is not None}
        params = llm.default_params(
            max_tokens=self.max_output_tokens,
            stop=stop_strings(self.stop),
            logprobs=(self.top_logprobs or 0) if self.wants_logprobs() else None,
            thinking_budget=budget,
            structured_outputs=self._form(),
            **given,
        )
        choice = self.tool_choice or "auto"
        return Turn(
            messages=self.messages(),
            params=params,
            tools=[
                function_tool(tool.name, tool.description, tool.parameters, tool.strict)
                for tool in self.tools or ()
            ],
            tool_choice=choice if isinstance(choice, str) else {"name": choice.name},
            parallel=self.parallel_tool_calls is not False,
            enable_thinking=thinks,
            options=options,
        ).pairs(llm)

    def writer(self, llm: LLM, head: Head) -> ResponseWriter:
        """Writes the answer."""
        echoed = {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "reasoning": msgspec.to_builtins(self.reasoning or ReasoningOptions()),
            "temperature": self.temperature,
            "text": {"format": {"type": "text"}, **_given(self.text)},
            "tool_choice": msgspec.to_builtins(self.tool_choice or "auto"),
            "tools": msgspec.to_builtins(self.tools or []),
            "top_p": self.top_p,
            "previous_response_id": self.previous_response_id,
            "store": self.store is not False,
            "truncation": "disabled",
        }
        return ResponseWriter(
            head,
            echoed,
            tokenizer=llm.tokenizer if self.wants_logprobs() else None,
            hidden_ids=llm.eos_ids,
            explain=bool(self.qnext and self.qnext.explain),
        )

    def wants_logprobs(self) -> bool:
        """Whether log-probabilities go with the text."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def _form(self) -> StructuredOutputs | None:
        wanted = self.text.format if self.text else None
        if wanted is None:
            return None
        if wanted.type == "json_schema" and wanted.schema is None:
            raise RequestError("text.format.schema: required and missing.")
        schema = NamedSchema(schema=wanted.schema) if wanted.schema is not None else None
        return ResponseFormat(type=wanted.type, json_schema=schema).form()


def _given(options: TextOptions | None) -> dict[str, Any]:
    found = msgspec.to_builtins(options) if options else {}
    return {name: value for name, value in found.items() if value is not None}


def _needed(value: Any, where: str) -> Any:
    if value is None:
        raise RequestError(f"{where}: required and missing.")
    return value


def _text(content: str | list[InputPart]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text or part.refusal for part in content)


def _answering(found: list[dict[str, Any]], reasoning: str) -> dict[str, Any]:
    """The assistant's message that is being put together: the last one, or a new one."""
    if not found or found[-1]["role"] != "assistant" or reasoning:
        found.append({"role": "assistant", "content": None})
        if reasoning:
            found[-1]["reasoning_content"] = reasoning
    return found[-1]
