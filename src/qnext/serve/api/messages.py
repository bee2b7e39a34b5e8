"""``POST /v1/messages`` and ``/v1/messages/count_tokens``: the interface of Anthropic's clients."""

from typing import Any, Literal

import msgspec

from qnext.engine.request import StructuredOutputs
from qnext.errors import RequestError
from qnext.llm import LLM
from qnext.serve.api.fields import (
    Effort,
    Head,
    Pairs,
    Turn,
    function_tool,
    stop_strings,
    template_options,
    thinking_budget,
)
from qnext.serve.api.messages_writer import MessageWriter
from qnext.serve.reading import RequestBody

_ROUTING = frozenset(
    {
        "cache_control", "inference_geo", "user_profile_id", "workspace_id", "speed",
        "service_tier", "metadata", "diagnostics",
    }
)  # fmt: skip


class TextBlock(msgspec.Struct, kw_only=True):
    """A text; ``cache_control`` and the like in it are left aside, prefixes are always kept."""

    type: Literal["text"]
    text: str


class Block(msgspec.Struct, kw_only=True):
    """A part of a message; this model reads text only."""

    type: Literal["text", "thinking", "redacted_thinking", "tool_use", "tool_result"]
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


class AnthropicMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class AnthropicTool(msgspec.Struct, kw_only=True):
    """A tool of the client's; tools that run at the provider are not here."""

    name: str
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    description: str | None = None
    strict: bool | None = None


class AnthropicChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Whether tools are called: ``any`` asks for at least one call, ``tool`` for one by name."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, kw_only=True):
    """Whether the model thinks before it answers; left out, it does not if it has the choice."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputForm(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A schema the answer follows."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How the answer is to be."""

    effort: Effort | None = None
    format: OutputForm | None = None


class Conversing(RequestBody, kw_only=True):
    """What answering and counting share."""

    LABORIOUS = frozenset({"tools", "output_config"})

    messages: list[AnthropicMessage]
    system: str | list[TextBlock] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    def conversation(self) -> list[dict[str, Any]]:
        """The messages as templates know them. Raises RequestError naming a block."""
        found: list[dict[str, Any]] = []
        if self.system is not None:
            found.append({"role": "system", "content": _text(self.system)})
        for index, message in enumerate(self.messages):
            if isinstance(message.content, str):
                found.append({"role": message.role, "content": message.content})
            else:
                where = f"messages[{index}].content"
                found += _spread(message.role, message.content, where)
        return found

    def turn(self, llm: LLM, **params: Any) -> Turn:
        """The conversation to carry on."""
        budget, thinks = self._thinking()
        options, thinks = template_options(None, thinks, budget)
        if self.messages and self.messages[-1].role == "assistant":
            options["continue_final_message"] = True  # begun by the client, for the model to end
        choice = self.tool_choice or AnthropicChoice(type="auto")
        kinds: dict[str, Any] = {"any": "required", "tool": {"name": choice.name}}
        if choice.type == "tool" and choice.name is None:
            raise RequestError("tool_choice.name: required and missing.")
        wanted = self.output_config and self.output_config.format
        return Turn(
            messages=self.conversation(),
            params=llm.default_params(
                thinking_budget=budget,
                structured_outputs=StructuredOutputs(json_schema=wanted.schema) if wanted else None,
                **params,
            ),
            tools=[
                function_tool(tool.name, tool.description, tool.input_schema, tool.strict)
                for tool in self.tools or ()
            ],
            tool_choice=kinds.get(choice.type, choice.type),
            parallel=choice.disable_parallel_tool_use is not True,
            enable_thinking=thinks,
            options=options,
        )

    def _thinking(self) -> tuple[int | None, bool | None]:
        effort = self.output_config and self.output_config.effort
        if self.thinking is None:
            return thinking_budget(None, effort), None if effort else False
        if self.thinking.type == "enabled":
            if self.thinking.budget_tokens is None:
                raise RequestError("thinking.budget_tokens: required and missing.")
            return thinking_budget(self.thinking.budget_tokens, None), True
        thinks = False if self.thinking.type == "disabled" else None
        return thinking_budget(None, effort), thinks


class MessagesRequest(Conversing, kw_only=True):
    """A conversation to answer."""

    IGNORED = _ROUTING
    REFUSED = {"container": ()}  # noqa: RUF012

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def prepare(self, llm: LLM) -> Pairs:
        """The request that answers it. Raises QnextError for what cannot be answered."""
        plain = ("temperature", "top_p", "top_k", "seed")
        given = {name: getattr(self, name) for name in plain if getattr(self, name) is not None}
        stop = stop_strings(self.stop_sequences, "stop_sequences")
        return self.turn(llm, max_tokens=self.max_tokens, stop=stop, **given).pairs(llm)

    def writer(self, llm: LLM, head: Head) -> MessageWriter:
        """Writes the answer."""
        hides = self.thinking is not None and self.thinking.display == "omitted"
        return MessageWriter(head, hides_thinking=hides)


class CountRequest(Conversing, kw_only=True):
    """A conversation to count the tokens of."""

    IGNORED = _ROUTING

    def answer(self, llm: LLM) -> dict[str, Any]:
        """The tokens of the prompt. Raises QnextError."""
        pairs = self.turn(llm, max_tokens=1).pairs(llm)
        return {"input_tokens": len(pairs[0][0].prompt_ids)}


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def _spread(role: str, blocks: list[Block], where: str) -> list[dict[str, Any]]:
    """The messages of one list of blocks: results of tools have messages of their own."""
    found: list[dict[str, Any]] = []
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(blocks):
        at = f"{where}[{index}]"
        if block.type == "text":
            texts.append(_needed(block.text, f"{at}.text"))
        elif block.type == "thinking":
            reasoning.append(_needed(block.thinking, f"{at}.thinking"))
        elif block.type == "tool_use":
            call = {
                "name": _needed(block.name, f"{at}.name"),
                "arguments": _needed(block.input, f"{at}.input"),
            }
            calls.append({"id": block.id, "type": "function", "function": call})
        elif block.type == "tool_result":
            content = _text(block.content or "")
            name = _needed(block.tool_use_id, f"{at}.tool_use_id")
            found.append({"role": "tool", "content": content, "tool_call_id": name})
    if (reasoning or calls) and role != "assistant":
        raise RequestError(f"{where}: thinking and tool_use belong into the assistant's messages.")
    if role == "assistant":
        message: dict[str, Any] = {"role": role, "content": "".join(texts)}
        if reasoning:
            message["reasoning_content"] = "".join(reasoning)
        if calls:
            message["tool_calls"] = calls
        found.append(message)
    elif texts or not found:
        found.append({"role": role, "content": "".join(texts)})
    return found


def _needed(value: Any, where: str) -> Any:
    if value is None:
        raise RequestError(f"{where}: required and missing.")
    return value
