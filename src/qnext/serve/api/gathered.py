"""What has arrived of one answer so far, and its token counts in OpenAI's shape."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from qnext.answers import Delta
from qnext.engine.request import FinishReason, TokenLogprobs, Usage
from qnext.text.calls.parts import CallEnd, Output, Part, assemble
from qnext.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Gathered:
    """The deltas of one choice, put together."""

    parts: list[Part] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None

    def take(self, delta: Delta) -> None:
        """Add a delta."""
        self.parts += delta.parts
        if delta.logprobs:
            self.logprobs += delta.logprobs
        self.finish_reason, self.usage = delta.finish_reason, delta.usage

    @property
    def output(self) -> Output:
        """Reasoning, content and calls so far."""
        return assemble(self.parts)

    @property
    def has_called(self) -> bool:
        """Whether a complete call is among it."""
        return any(isinstance(part, CallEnd) for part in self.parts)


def usage_body(choices: Iterable[Gathered], *, per_prompt: int, explain: bool) -> dict[str, Any]:
    """Token counts of an answer with several choices; each prompt counts once.

    ``explain`` adds what of the (first) prompt was reused and why not more.
    """
    used = [choice.usage for choice in choices if choice.usage is not None]
    prompts = used[::per_prompt]
    prompt_tokens = sum(one.prompt_tokens for one in prompts)
    completion_tokens = sum(one.completion_tokens for one in used)
    cache = prompts[0].cache if prompts else None
    extra = {"qnext": {"cache": cache and cache.as_dict()}} if explain else {}
    return {
        **extra,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in prompts)},
        "completion_tokens_details": {
            "reasoning_tokens": sum(one.reasoning_tokens for one in used),
            "drafted_tokens": sum(one.drafted_tokens for one in used),
            "accepted_tokens": sum(one.accepted_tokens for one in used),
            "near_ties": sum(one.near_ties for one in used),
        },
    }


class LogprobsText:
    """Log-probabilities as JSON, with tokens as text."""

    def __init__(self, tokenizer: Tokenizer, hidden_ids: Iterable[int] = ()) -> None:
        """``hidden_ids`` end an answer and are no part of it."""
        self._tokenizer, self._hidden = tokenizer, frozenset(hidden_ids)

    def shown(self, items: Iterable[TokenLogprobs]) -> list[TokenLogprobs]:
        """Those of tokens that are part of the answer."""
        return [item for item in items if item.token_id not in self._hidden]

    def token(self, token_id: int) -> tuple[str, bytes]:
        """A token as text (not UTF-8 by itself: U+FFFD) and as bytes; padding rows are empty."""
        if token_id >= self._tokenizer.id_limit:
            return "", b""
        raw = self._tokenizer.token_bytes(token_id)
        return raw.decode("utf-8", errors="replace"), raw

    def content(self, items: Iterable[TokenLogprobs]) -> list[dict[str, Any]]:
        """The entries of ``logprobs.content`` of a chat completion."""
        return [
            {
                **self._entry(item.token_id, item.logprob),
                "top_logprobs": [self._entry(token, value) for token, value in item.top],
            }
            for item in self.shown(items)
        ]

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = self.token(token_id)
        return {"token": text, "logprob": finite(logprob), "bytes": list(raw)}


def finite(value: float) -> float:
    """A log-probability JSON can hold; what was ruled out (-inf) becomes the customary -9999."""
    return max(value, -9999.0)
