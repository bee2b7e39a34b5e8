"""Fields that several interfaces share, and what they mean to the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgspec

from qnext.answers import TextReader
from qnext.engine.request import Request, SamplingParams, StructuredOutputs
from qnext.errors import RequestError
from qnext.llm import LLM
from qnext.serve.reading import RequestBody
from qnext.serve.refusals import ApiError

MAX_STOP_STRINGS = 16
RESERVED = frozenset(
    {
        "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
        "tool_choice", "bos_token", "eos_token", "pad_token", "unk_token", "strftime_now",
        "raise_exception",
    }
)  # fmt: skip
"""Names inside a template that a request cannot set as an option."""

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
BUDGETS: Mapping[str, int | None] = {
    "none": 0, "minimal": 256, "low": 1024, "medium": 4096, "high": 16384, "xhigh": None,
    "max": None,
}  # fmt: skip
"""``reasoning_effort`` as tokens of thinking; None for as many as the model wants."""

Pairs = list[tuple[Request, TextReader]]


class Writer(Protocol):
    """Writes one answer in the format of its interface, whole or as server-sent events."""

    def opening(self) -> bytes:
        """Events before the first piece of text."""
        ...

    def piece(self, index: int, delta: Any) -> bytes:
        """Events for one delta of one choice."""
        ...

    def closing(self) -> bytes:
        """Events after the last delta."""
        ...

    def failure(self, error: ApiError) -> bytes:
        """Events that end a stream because of an error."""
        ...

    def whole(self) -> dict[str, Any]:
        """The answer in one piece, from the deltas ``piece`` or ``take`` was given."""
        ...

    def take(self, index: int, delta: Any) -> None:
        """Note a delta without writing events."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """What every part of an answer repeats."""

    id: str
    model: str
    created: int
    """Seconds since 1970."""


@dataclass(kw_only=True, slots=True)
class Turn:
    """A conversation the model is to carry on, whatever interface it came through."""

    messages: list[dict[str, Any]]
    params: SamplingParams
    tools: list[dict[str, Any]]
    tool_choice: str | Mapping[str, Any] = "auto"
    parallel: bool = True
    """Whether an answer may hold several calls."""
    enable_thinking: bool | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Further ones of the chat template."""

    def pairs(self, llm: LLM) -> Pairs:
        """The requests that answer it. Raises QnextError for what cannot be answered."""
        return llm.choices(
            *llm.prepare_chat(
                self.messages,
                self.params,
                enable_thinking=self.enable_thinking,
                tools=self.tools or None,
                tool_choice=self.tool_choice,
                parallel_tool_calls=self.parallel,
                template_options=self.options,
                parse_tools=self.tool_choice != "none",
            )
        )


class Function(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A function the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of its arguments."""
    strict: bool | None = None
    """Bind the arguments to the schema."""


class Tool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool, which is a function."""

    function: Function
    type: Literal["function"] = "function"

    def for_template(self) -> dict[str, Any]:
        """The tool as templates know it."""
        return {"type": "function", "function": msgspec.to_builtins(self.function)}


def function_tool(
    name: str, description: str | None, parameters: dict[str, Any] | None, strict: bool | None
) -> dict[str, Any]:
    """A tool as templates know it."""
    function = Function(name=name, description=description, parameters=parameters, strict=strict)
    return Tool(function=function).for_template()


class JsonSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A named schema."""

    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def form(self) -> StructuredOutputs | None:
        """What the engine holds the answer to; None for plain text."""
        if self.type == "json_schema":
            schema = self.json_schema and self.json_schema.schema
            if schema is None:
                raise RequestError("response_format.json_schema.schema: required and missing.")
            return StructuredOutputs(json_schema=schema)
        if self.json_schema is not None:
            raise RequestError(
                f"response_format.json_schema: goes with type 'json_schema', not {self.type!r}."
            )
        return StructuredOutputs(json_object=True) if self.type == "json_object" else None


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How a stream is written."""

    include_usage: bool | None = None
    """Send one more chunk that holds the usage and no choices."""
    continuous_usage_stats: bool | None = None
    """Put the usage so far into every chunk."""
    include_obfuscation: bool | None = None
    """Accepted and without effect: this server pads nothing."""


class QnextOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What only this server knows."""

    explain: bool | None = None
    """Say in the usage what of the prompt was reused, and why not more."""
    inspect: bool | None = None
    """Remember the answer for ``GET /inspect/ID``."""


class Sampling(RequestBody, kw_only=True):
    """What both kinds of completion share; null and a missing field mean the model's default."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    n: int | None = None
    qnext: QnextOptions | None = None

    def wants_explanation(self) -> bool:
        """Whether the usage says why no more was reused."""
        return bool(self.qnext and self.qnext.explain)

    def wants_inspection(self) -> bool:
        """Whether the answer is to be remembered for ``GET /inspect/ID``."""
        return bool(self.qnext and self.qnext.inspect)

    def limit(self) -> int | None:
        """Most tokens to generate; None for as many as the context holds."""
        return self.max_tokens

    def params(self, llm: LLM, **more: Any) -> SamplingParams:
        """Sampling parameters: the checkpoint's own, where the request says nothing else.

        Raises RequestError for a value out of range.
        """
        plain = (
            "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos",
            "presence_penalty", "frequency_penalty", "repetition_penalty", "n",
        )  # fmt: skip
        given = {name: getattr(self, name) for name in plain if getattr(self, name) is not None}
        return llm.default_params(
            max_tokens=self.limit(),
            stop=stop_strings(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            bad_words=tuple(self.bad_words or ()),
            logit_bias=_logit_bias(self.logit_bias or {}),
            **given,
            **more,
        )


def stop_strings(value: str | Sequence[str] | None, name: str = "stop") -> tuple[str, ...]:
    """The strings that end an answer. Raises RequestError for too many."""
    stop = (value,) if isinstance(value, str) else tuple(value or ())
    if len(stop) > MAX_STOP_STRINGS:
        raise RequestError(f"{name}: expected at most {MAX_STOP_STRINGS} strings, got {len(stop)}.")
    return stop


def template_options(
    given: Mapping[str, Any] | None, enable_thinking: bool | None, budget: int | None
) -> tuple[dict[str, Any], bool | None]:
    """(further options of the template, whether it lets the model think).

    ``budget`` 0 switches thinking off. Raises RequestError for a name the template owns, and where
    two fields contradict each other.
    """
    options = dict(given or {})
    for name in options:
        if name in RESERVED:
            raise RequestError(
                f"chat_template_kwargs.{name}: is not an option of the template; use the field of "
                "the request, where there is one."
            )
    inner = options.pop("enable_thinking", None)
    if inner is not None and not isinstance(inner, bool):
        found = type(inner).__name__
        raise RequestError(f"chat_template_kwargs.enable_thinking: expected bool, got {found}.")
    if enable_thinking is not None and inner is not None and inner != enable_thinking:
        raise RequestError(
            "enable_thinking: contradicts chat_template_kwargs.enable_thinking; give one of them."
        )
    wanted = inner if enable_thinking is None else enable_thinking
    return options, False if budget == 0 and wanted is None else wanted


def thinking_budget(budget: int | None, effort: Effort | None) -> int | None:
    """Most tokens of reasoning; a budget given in tokens comes before an effort."""
    if budget is not None and budget < 0:
        raise RequestError(f"thinking_budget: expected at least 0, found {budget}.")
    return BUDGETS[effort] if budget is None and effort is not None else budget


def _logit_bias(raw: Mapping[str, float]) -> dict[int, float]:
    biases = {}
    for key, value in raw.items():
        if not key.isascii() or not key.isdecimal():
            raise RequestError(f"logit_bias: expected token ids as keys, got {key!r}.")
        if not -100.0 <= value <= 100.0:
            raise RequestError(f"logit_bias: expected values from -100 to 100, got {value!r}.")
        biases[int(key)] = value
    return biases
