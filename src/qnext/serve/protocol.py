"""What the HTTP interface accepts and returns: OpenAI's request and response formats, checked.

Every field of a body is one of four kinds. *Supported*: the attributes of the request types below.
*Ignored*: without influence on the answer; named in a response header and in the log. *Refused*:
known to OpenAI's interface and not available here, accepted only with the value that asks for
nothing. Anything else is *unknown* and refused too: a misspelt option that silently does nothing
is worse than an error. Errors name the place: ``messages[2].content: expected str, got int``.
"""

import difflib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from qnext.engine.request import SamplingParams, Usage
from qnext.errors import QnextError, RequestError
from qnext.llm import LLM, Delta

IGNORED = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "parallel_tool_calls",
    }
)  # fmt: skip
"""Fields that do not change the answer of a single local server."""

REFUSED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "thinking_budget": (),
    "verbosity": (),
    "suffix": ("",),
    "echo": (False,),
    "use_beam_search": (False,),
    "guided_json": (),
    "guided_regex": (),
    "continue_final_message": (False,),
}
"""Fields not available here -> the values, beside null, that ask for nothing."""

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_STOP_STRINGS = 16
_PATH = re.compile(r"([a-z_]+(?:\[\d+\]|\.[a-z_]+)*): ")


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.type, self.param, self.code = status, type, param, code

    @classmethod
    def of(cls, error: QnextError, *, code: str | None = None) -> "ApiError":
        """The refusal of a request by any part of qnext; its text already says where and why."""
        where = _PATH.match(str(error))
        return cls(400, str(error), param=where.group(1) if where else None, code=code)

    def body(self) -> dict[str, Any]:
        """The JSON that is sent."""
        return {
            "error": {
                "message": str(self),
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


# -- requests ----------------------------------------------------------------------------------


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How a stream ends."""

    include_usage: bool | None = None
    """Send one more chunk that holds the usage and no choices."""


class TemplateOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Switches of the chat template."""

    enable_thinking: bool | None = None


class QnextOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What only this server knows."""

    explain: bool | None = None
    """Say in the usage what of the prompt was reused, and why not more."""


class Sampling(msgspec.Struct, kw_only=True):
    """What both kinds of completion share; null and a missing field mean the model's default."""

    model: str | None = None
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
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    qnext: QnextOptions | None = None

    def wants_explanation(self) -> bool:
        """Whether the usage says why no more was reused."""
        return bool(self.qnext and self.qnext.explain)

    def limit(self) -> int | None:
        """Most tokens to generate; None for as many as the context holds."""
        return self.max_tokens

    def wants_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def params(self, llm: LLM) -> SamplingParams:
        """Sampling parameters: the checkpoint's own, where the request says nothing else.

        Raises RequestError for a value out of range.
        """
        plain = (
            "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos",
            "presence_penalty", "frequency_penalty", "repetition_penalty",
        )  # fmt: skip
        given = {name: getattr(self, name) for name in plain if getattr(self, name) is not None}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > MAX_STOP_STRINGS:
            raise RequestError(
                f"stop: expected at most {MAX_STOP_STRINGS} strings, got {len(stop)}."
            )
        return llm.default_params(
            max_tokens=self.limit(),
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=_logit_bias(self.logit_bias or {}),
            **given,
        )


class ChatRequest(Sampling, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    chat_template_kwargs: TemplateOptions | None = None

    def limit(self) -> int | None:
        """Most tokens to generate, from either spelling."""
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise RequestError(
                f"max_tokens: {old} contradicts max_completion_tokens ({new}); give one of them."
            )
        return old if new is None else new

    @property
    def enable_thinking(self) -> bool | None:
        """Whether the template lets the model think; None for its own default."""
        return self.chat_template_kwargs and self.chat_template_kwargs.enable_thinking

    def checked_messages(self) -> list[dict[str, Any]]:
        """The messages with known roles; ``developer`` is what newer clients call ``system``."""
        for i, message in enumerate(self.messages):
            role = message.get("role")
            if role is not None and role not in ROLES:
                raise RequestError(
                    f"messages[{i}].role: expected one of {', '.join(ROLES)}, got {role!r}."
                )
        return [
            {**message, "role": "system"} if message.get("role") == "developer" else message
            for message in self.messages
        ]


class CompletionRequest(Sampling, kw_only=True):
    """``POST /v1/completions``: plain text or token ids to continue."""

    prompt: str | list[Any]

    def single_prompt(self) -> str | list[int]:
        """The one prompt: a text, token ids, or a list of one text."""
        if isinstance(self.prompt, str):
            return self.prompt
        if all(isinstance(item, int) and not isinstance(item, bool) for item in self.prompt):
            return self.prompt
        if len(self.prompt) == 1 and isinstance(self.prompt[0], str):
            return self.prompt[0]
        if all(isinstance(item, str) for item in self.prompt):
            raise RequestError(
                f"prompt: expected one text per request, got {len(self.prompt)}. Send them as "
                "separate requests; they run side by side."
            )
        raise RequestError("prompt: expected str, a list of one str, or a list of token ids.")


Body = TypeVar("Body", bound=Sampling)


def read_body(body: bytes, kind: type[Body]) -> tuple[Body, list[str]]:
    """Parse and check a body; returns the request and the names of the ignored fields.

    Raises ApiError (400) naming the place.
    """
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}.", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply.", code="invalid_json") from None
    if not isinstance(raw, dict):
        found = type(raw).__name__
        raise ApiError(400, f"the body: expected a JSON object, got {found}.", code="invalid_json")
    ignored = sorted(IGNORED & raw.keys())
    known = {field.name for field in msgspec.structs.fields(kind)}
    for name, value in raw.items():
        if name not in known and name not in IGNORED:
            _refuse(name, value, known)
    fields = {name: value for name, value in raw.items() if name in known}
    try:
        return msgspec.convert(fields, kind), ignored
    except msgspec.ValidationError as error:
        raise _named(error) from None


def _refuse(name: str, value: Any, known: set[str]) -> None:
    if name in REFUSED:
        if value is None or value in REFUSED[name]:
            return
        neutral = " or ".join(["null", *(repr(item) for item in REFUSED[name])])
        raise ApiError(
            400,
            f"{name}: not supported by this server; leave it out (or send {neutral}).",
            param=name,
            code="unsupported_parameter",
        )
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise ApiError(
        400, f"{name}: unknown field.{hint}", param=name, code="unknown_parameter"
    )  # fmt: skip


def _named(error: msgspec.ValidationError) -> ApiError:
    """msgspec says ``Expected `str`, got `int` - at `$.stop[0]```; the place belongs first."""
    text, _, place = str(error).partition(" - at `$")
    text = text.replace("`", "")
    place = place.rstrip("`").lstrip(".")
    missing = re.fullmatch(r"Object missing required field (\w+)", text)
    if missing:
        place = f"{place}.{missing.group(1)}".lstrip(".")
        text = "required and missing"
    unknown = re.fullmatch(r"Object contains unknown field (\w+)", text)
    if unknown:
        place = f"{place}.{unknown.group(1)}".lstrip(".")
        text = "unknown field"
    return ApiError(400, f"{place}: {text[0].lower()}{text[1:]}.", param=place)


def _logit_bias(raw: Mapping[str, float]) -> dict[int, float]:
    biases = {}
    for key, value in raw.items():
        if not key.isascii() or not key.isdecimal():
            raise RequestError(f"logit_bias: expected token ids as keys, got {key!r}.")
        if not -100.0 <= value <= 100.0:
            raise RequestError(f"logit_bias: expected values from -100 to 100, got {value!r}.")
        biases[int(key)] = value
    return biases


# -- responses ---------------------------------------------------------------------------------


def usage_body(usage: Usage, *, explain: bool = False) -> dict[str, Any]:
    """Token counts in OpenAI's shape; ``explain`` adds what of the prompt was reused and why."""
    extra = {"qnext": {"cache": usage.cache and usage.cache.as_dict()}} if explain else {}
    return {
        **extra,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "drafted_tokens": usage.drafted_tokens,
            "accepted_tokens": usage.accepted_tokens,
            "near_ties": usage.near_ties,
        },
    }


class Reply:
    """Writes the JSON of one answer: whole, or as chunks of a stream."""

    def __init__(
        self, *, chat: bool, id: str, model: str, created: int, usage: bool, explain: bool = False
    ) -> None:
        """``usage`` asks for a last chunk with token counts; ``created`` is in Unix seconds."""
        self._chat, self._wants_usage = chat, usage
        self._explain = explain
        name = "chat.completion" if chat else "text_completion"
        self._head = {"id": id, "object": name, "created": created, "model": model}
        self._chunk_head = {**self._head, "object": "chat.completion.chunk" if chat else name}
        if usage:
            self._chunk_head["usage"] = None

    def whole(self, deltas: list[Delta]) -> dict[str, Any]:
        """The answer in one piece."""
        last = deltas[-1]
        text = "".join(delta.text for delta in deltas)
        choice: dict[str, Any] = {"index": 0}
        if self._chat:
            message = {"role": "assistant", "content": text}
            reasoning = "".join(delta.reasoning for delta in deltas)
            if reasoning:
                message["reasoning_content"] = reasoning
            choice["message"] = message
        else:
            choice["text"] = text
        choice |= {"logprobs": None, "finish_reason": last.finish_reason}
        return {
            **self._head,
            "choices": [choice],
            "usage": usage_body(last.usage, explain=self._explain),
        }

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first piece of text."""
        if not self._chat:
            return []
        return [self._chunk({"delta": {"role": "assistant", "content": ""}}, None)]

    def piece(self, delta: Delta) -> list[dict[str, Any]]:
        """Chunks for one delta: text first, then the reason the answer ended, then the usage."""
        chunks = []
        if self._chat:
            parts = {"reasoning_content": delta.reasoning, "content": delta.text}
            parts = {name: text for name, text in parts.items() if text}
            if parts:
                chunks.append(self._chunk({"delta": parts}, None))
        elif delta.text:
            chunks.append(self._chunk({"text": delta.text}, None))
        if delta.finish_reason is not None:
            empty = {"delta": {}} if self._chat else {"text": ""}
            chunks.append(self._chunk(empty, delta.finish_reason))
            if self._wants_usage:
                usage = usage_body(delta.usage, explain=self._explain)
                chunks.append({**self._chunk_head, "choices": [], "usage": usage})
        return chunks

    def _chunk(self, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        return {**self._chunk_head, "choices": [choice]}
