"""What goes into the engine and what comes out: requests and events, in token ids only.

No text, no torch. A request is ids and sampling parameters; an event is what one step added to one
request. The names of the parameters are those vLLM uses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from qnext.engine.explain import CacheReport
from qnext.engine.guide import Rules
from qnext.engine.watch import Watch
from qnext.errors import RequestError

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""An end token or a complete form; a limit; the caller; a grammar that became too complex."""


EndedBy = Literal[
    "end_token", "stop_token", "stop_string", "form", "max_tokens", "context", "cancelled", "error"
]
"""What exactly ended an answer. ``form`` is a grammar or a call that was complete."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputs:
    """The form of an answer; exactly one of these. RequestError for none or several."""

    json_schema: Mapping[str, Any] | bool | str | None = None
    """JSON that this schema accepts; an object, or its JSON text."""
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = None
    """Text that this regular expression matches as a whole."""
    choice: Sequence[str] | None = None
    """One of these texts."""
    grammar: str | None = None
    """Text of this grammar, in llguidance's dialect of Lark."""

    def __post_init__(self) -> None:
        given = [name for name in ("json_schema", "regex", "choice", "grammar")
                 if getattr(self, name) is not None]  # fmt: skip
        given += ["json_object"] if self.json_object else []
        if len(given) != 1:
            raise RequestError(
                "structured_outputs: expected one of json_schema, json_object, regex, choice and "
                f"grammar, found {' and '.join(given) or 'none'}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when to stop. Raises RequestError for impossible values."""

    temperature: float = 1.0
    """0 takes the most likely token; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Smallest set of likeliest tokens whose probabilities sum to at least this."""
    top_k: int = 0
    """Number of likeliest tokens considered; 0 for all."""
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest are dropped."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token already generated."""
    frequency_penalty: float = 0.0
    """Subtracted for every time a token was generated."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output."""
    seed: int | None = None
    """Same seed, same tokens, whatever else the engine is doing. None draws one."""
    max_tokens: int | None = 16
    """Most tokens to generate; None for as many as the context holds."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens are not chosen before so many tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Further token ids that end the sequence."""
    ignore_eos: bool = False
    """Keep going after an end-of-sequence token."""
    bad_words: tuple[str, ...] = ()
    """Texts that are never completed."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of single tokens."""
    logprobs: int | None = None
    """Report the log-probability of each token and of so many alternatives (0 ... 20)."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt; its positions are then computed, never reused."""
    n: int = 1
    """Answers to the same prompt; answer c uses the seed (seed, c)."""
    thinking_budget: int | None = None
    """Most tokens of reasoning that are sampled; then a sentence and ``</think>`` are inserted and
    the answer goes on. 0 ends the reasoning before it begins. None sets no limit."""
    structured_outputs: StructuredOutputs | None = None
    """The form of the answer, from behind the reasoning to its end."""
    json_schema: Mapping[str, Any] | bool | str | None = None
    """Short for ``structured_outputs=StructuredOutputs(json_schema=...)``, like the next three."""
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    @property
    def form(self) -> StructuredOutputs | None:
        """The form of the answer, whichever way it was asked for; None for any."""
        given = {
            name: getattr(self, name)
            for name in ("json_schema", "regex", "choice", "grammar")
            if getattr(self, name) is not None
        }
        return StructuredOutputs(**given) if given else self.structured_outputs

    def __post_init__(self) -> None:
        if self.thinking_budget is not None:
            if type(self.thinking_budget) is not int:
                raise RequestError(
                    f"thinking_budget: expected a whole number, found {self.thinking_budget!r}."
                )
            self._check("thinking_budget", self.thinking_budget, 0, None)
        if self.structured_outputs is not None and not isinstance(
            self.structured_outputs, StructuredOutputs
        ):
            raise RequestError(
                "structured_outputs: expected StructuredOutputs(json_schema=..., regex=..., "
                f"choice=..., grammar=... or json_object=True), found {self.structured_outputs!r}."
            )
        form = self.form
        if self.structured_outputs is not None and form is not self.structured_outputs:
            raise RequestError(
                "structured_outputs: contradicts json_schema, regex, choice or grammar beside it; "
                "give one of them."
            )
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if isinstance(self.bad_words, str):
            object.__setattr__(self, "bad_words", (self.bad_words,))
        object.__setattr__(self, "bad_words", tuple(self.bad_words))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._check("temperature", self.temperature, 0.0, 100.0)
        self._check("top_p", self.top_p, 0.0, 1.0, open_low=True)
        self._check("min_p", self.min_p, 0.0, 1.0)
        self._check("presence_penalty", self.presence_penalty, -2.0, 2.0)
        self._check("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        self._check("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        self._check("top_k", self.top_k, -1, None)
        if self.seed is not None and type(self.seed) is not int:
            raise RequestError(f"seed: expected a whole number, found {self.seed!r}.")
        self._check("min_tokens", self.min_tokens, 0, None)
        if self.max_tokens is not None:
            self._check("max_tokens", self.max_tokens, 1, None)
            if self.min_tokens > self.max_tokens:
                raise RequestError(
                    f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.max_tokens})."
                )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._check(name, getattr(self, name), 0, 20)
        self._check("n", self.n, 1, 128)
        if any(not text for text in self.bad_words):
            raise RequestError("bad_words: an empty text would ban everything; remove it.")
        if any(not text for text in self.stop):
            raise RequestError("stop: an empty string would stop everything at once; remove it.")

    @staticmethod
    def _check(
        name: str, value: Any, low: float, high: float | None, *, open_low: bool = False
    ) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RequestError(f"{name}: expected a number, found {value!r}.")
        too_low = value <= low if open_low else value < low
        if not too_low and (high is None or value <= high):
            return
        least = f"more than {low:g}" if open_low else f"at least {low:g}"
        most = "" if high is None else f" and at most {high:g}"
        raise RequestError(f"{name}: expected {least}{most}, found {value!r}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One sequence to generate."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    eos_ids: tuple[int, ...] = ()
    """Tokens that end the sequence unless ``ignore_eos``."""
    bad_ids: tuple[tuple[int, ...], ...] = ()
    """``bad_words`` in token ids."""
    priority: int = 0
    """Lower is served first; equals in order of arrival."""
    choice: int = 0
    """Number of this answer among the ``n`` to the same prompt: part of the key of its noise."""
    group: str = ""
    """Requests of one group that have the same prompt run it once: as soon as the first of them has
    run it, the others go on from where it is. Empty for a request of its own."""
    hints: tuple[tuple[int, str], ...] = ()
    """(tokens, why) of prompt lengths where a later prompt is likely to part from this one."""
    places: tuple[tuple[int, str], ...] = ()
    """(first token, name) of the parts of a conversation, for explanations."""
    rules: Rules | None = None
    """What ``thinking_budget``, ``structured_outputs`` and tools ask of the answer."""
    watch: Watch | None = None
    """Where to record drafts and routing, if anywhere."""
    score_only: bool = False
    """Report the log-probabilities of the prompt and generate nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Log-probability of a generated token under the unmodified logits, and its best rivals."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, log-probability), likeliest first."""


@dataclass(kw_only=True, slots=True)
class Usage:
    """What a request has cost so far, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens that were not computed because a snapshot held them."""
    reasoning_tokens: int = 0
    drafted_tokens: int = 0
    """Drafts of the MTP head that were verified."""
    accepted_tokens: int = 0
    """Of those, the ones that are part of the answer."""
    forced_tokens: int = 0
    """Tokens of the answer that were not chosen: inserted at the end of a thinking budget, or the
    only ones a grammar allowed. They are neither drafted nor accepted."""
    reasoning_was_cut: bool = False
    """Whether the thinking budget ended the reasoning."""
    near_ties: int = 0
    """Tokens of the answer that another order of rounding might have chosen otherwise."""
    cache: CacheReport | None = None
    """What of the prompt was reused and why not more; None before the request was admitted."""

    def as_dict(self) -> dict[str, int]:
        """Plain numbers for JSON, the sum included."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "cached_tokens": self.cached_tokens,
            "reasoning_tokens": self.reasoning_tokens,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "forced_tokens": self.forced_tokens,
            "near_ties": self.near_ties,
        }


@dataclass(kw_only=True, slots=True)
class Event:
    """What one step added to one request."""

    request_id: str
    token_ids: Sequence[int]
    """New tokens in order; the end-of-sequence token is included."""
    finish_reason: FinishReason | None
    """None while the request runs."""
    usage: Usage
    ended_by: EndedBy | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """For the prompt's tokens from the second on; only in the last event before the answer."""
    forced_at: tuple[int, ...] = ()
    """Places in the answer of those new tokens that were not chosen."""
    ties_at: tuple[int, ...] = ()
    """Places in the answer of those that another order of rounding might have chosen otherwise."""
    cut_at: int | None = None
    """Place in the answer of what was inserted because the thinking budget was used up."""

    @classmethod
    def joined(cls, events: "Sequence[Event]") -> "Event":
        """What several steps, in order, added to one request."""
        if len(events) == 1:
            return events[0]
        return replace(
            events[-1],
            token_ids=[token for one in events for token in one.token_ids],
            logprobs=tuple([token for one in events for token in one.logprobs]),
            prompt_logprobs=tuple([token for one in events for token in one.prompt_logprobs]),
            forced_at=tuple([place for one in events for place in one.forced_at]),
            ties_at=tuple([place for one in events for place in one.ties_at]),
        )
