"""Answers: what requests give back, as text. Pieces as they come, and the whole.

``TextReader`` is the way from the events of one request, which are token ids, to pieces of text
that never have to be taken back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from qnext.engine.regions import Regions
from qnext.engine.request import EndedBy, Event, FinishReason, Request, TokenLogprobs, Usage
from qnext.text.calls.parts import Part, Piece, ToolCall, assemble, merged
from qnext.text.output import OutputParser, ToolFormat
from qnext.text.parse import StopMatcher
from qnext.text.tokenizer import Detokenizer, Tokenizer

Message = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """What a chat prompt was made of."""

    messages: tuple[Message, ...]
    options: Mapping[str, Any]
    """For the template."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """What a request added since the last one: text that is final."""

    text: str
    reasoning: str
    """The part inside the think block."""
    parts: tuple[Part, ...] = ()
    """``text`` and ``reasoning`` again, and the tool calls, in the order the model wrote them."""
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    """None until the last delta."""
    stop_string: str | None = None
    """The stop string that ended the answer, if one did."""
    usage: Usage
    ended_by: EndedBy | None = None
    """What exactly ended the answer; None until the last delta."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @classmethod
    def joined(cls, deltas: "Sequence[Delta]") -> "Delta":
        """One delta that says what these, of one request and in order, say together."""
        if len(deltas) == 1:
            return deltas[0]
        return replace(
            deltas[-1],
            text="".join([one.text for one in deltas]),
            reasoning="".join([one.reasoning for one in deltas]),
            parts=tuple(merged(chain.from_iterable([one.parts for one in deltas]))),
            token_ids=tuple(chain.from_iterable([one.token_ids for one in deltas])),
            logprobs=tuple(chain.from_iterable([one.logprobs for one in deltas])),
            prompt_logprobs=tuple(chain.from_iterable([one.prompt_logprobs for one in deltas])),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The whole answer to one prompt."""

    text: str
    reasoning: str | None
    """Text of the think block; None when the prompt was plain text or nothing was thought."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Complete calls; empty unless the request had tools. The finish reason is ``stop`` as well."""
    token_ids: tuple[int, ...]
    """Every generated id, the end-of-sequence token included."""
    finish_reason: FinishReason
    usage: Usage
    ended_by: EndedBy | None = None
    """What exactly ended the answer."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    others: "tuple[Completion, ...]" = ()
    """Further answers to the same prompt when ``n`` is more than 1."""

    @property
    def total_usage(self) -> Usage:
        """Tokens of all answers to the prompt together; the prompt itself was run once."""
        several = [self.usage, *(one.usage for one in self.others)]
        return replace(
            self.usage,
            completion_tokens=sum(one.completion_tokens for one in several),
            reasoning_tokens=sum(one.reasoning_tokens for one in several),
            drafted_tokens=sum(one.drafted_tokens for one in several),
            accepted_tokens=sum(one.accepted_tokens for one in several),
            forced_tokens=sum(one.forced_tokens for one in several),
            near_ties=sum(one.near_ties for one in several),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How likely a model finds a text."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Log-probability of every token but the first, given those before it."""

    @property
    def total(self) -> float:
        """Log-probability of the text after its first token."""
        return sum(self.logprobs)


class TextReader:
    """Turns the events of one request into deltas: UTF-8, stop strings, think block, tool calls.

    Calls are looked for when ``tool_format`` is given; ``tools`` are those of the request.
    ``push`` returns None when an event adds nothing visible yet. When a stop string matches,
    ``stopped`` turns true and the last delta says so; the caller then cancels the request.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: Request,
        *,
        split_reasoning: bool,
        regions: Regions,
        conversation: Conversation | None = None,
        tool_format: ToolFormat | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.request, self.conversation = request, conversation
        self._settings: dict[str, Any] = {
            "split_reasoning": split_reasoning, "regions": regions,
            "conversation": conversation, "tool_format": tool_format, "tools": tools,
        }  # fmt: skip
        self.stopped = False
        self._tokenizer = tokenizer
        self._parts: list[Part] = []
        self._bytes = Detokenizer(tokenizer, skip_special=True)
        self._stop = StopMatcher(list(request.params.stop))
        self._may_stop = bool(request.params.stop)
        self._splits = split_reasoning
        self._parser = OutputParser(
            starts_in_reasoning=regions.starts_in == "reasoning", split_reasoning=split_reasoning,
            format=tool_format, tools=tools,
        )  # fmt: skip
        self._regions, self._state = regions, regions.start()
        self._calls_are_whole = tool_format is not None and bool(request.params.stop)
        self._has_thought = False
        self._used = self._forced = self._ties = self._accepted = self._accepted_before = 0
        self._ended = False

    def alike(self, request: Request) -> "TextReader":
        """A reader of another answer to the same prompt."""
        return TextReader(self._tokenizer, request, **self._settings)

    def push(self, event: Event) -> Delta | None:
        """Feed one event; returns what has become final, or None."""
        if self._ended:
            return None
        ends = event.finish_reason is not None
        raw, used = self._text_of(event.token_ids, ends_by_token=event.finish_reason == "stop")
        if ends and not self.stopped:
            emit, self.stopped, _ = self._stop.push(self._bytes.finish())
            raw += emit + ("" if self.stopped else self._stop.finish())
        self._ended = ends or self.stopped
        self._count(event, used)
        parts = self._parser.push(raw)
        if self._ended:
            parts += self._parser.finish()
        text, reasoning = _joined(parts, "content"), _joined(parts, "reasoning")
        self._has_thought = self._has_thought or not self._splits or bool(reasoning.strip())
        delta = Delta(
            text=text,
            reasoning=reasoning,
            parts=tuple(parts),
            token_ids=tuple(event.token_ids[:used]),
            finish_reason="stop" if self.stopped else event.finish_reason,
            ended_by="stop_string" if self.stopped else event.ended_by,
            stop_string=self._stop.matched,
            usage=replace(
                event.usage,
                completion_tokens=self._used,
                forced_tokens=self._forced,
                accepted_tokens=self._accepted,
                near_ties=self._ties,
                reasoning_was_cut=event.cut_at is not None and event.cut_at < self._used,
                # The newlines of a block that was left empty are no reasoning.
                reasoning_tokens=self._state.thought if self._has_thought else 0,
            ),
            logprobs=event.logprobs[:used],
            prompt_logprobs=event.prompt_logprobs,
        )
        if self.request.watch is not None:
            self.request.watch.tokens += delta.token_ids
        if self.conversation is not None:
            self._parts += parts
        return delta

    def push_all(self, events: Sequence[Event]) -> list[Delta]:
        """Feed the events of several steps; like ``push`` for each, in as few deltas as can be."""
        if not events:
            return []
        if events[-1].finish_reason is not None and not events[-1].token_ids:
            *before, last = events  # which would pass for the end of the tokens before it
            found = [*self.push_all(before), self.push(last)]
        else:
            found = [self.push(Event.joined(events))]
        return [delta for delta in found if delta is not None]

    def _count(self, event: Event, used: int) -> None:
        """Count the first ``used`` tokens of an event; those behind a stop string never were."""
        self._used += used
        forced = sum([place < self._used for place in event.forced_at])
        self._forced += forced
        self._ties += sum([place < self._used for place in event.ties_at])
        # What a step accepts comes first of what it chooses.
        new = event.usage.accepted_tokens - self._accepted_before
        self._accepted += min(new, used - forced)
        self._accepted_before = event.usage.accepted_tokens

    @property
    def must_read_at_once(self) -> bool:
        """Whether something in the text might end the answer before the engine would."""
        return self._may_stop

    def _text_of(self, token_ids: Sequence[int], *, ends_by_token: bool) -> tuple[str, int]:
        """Text that tokens complete, without stop strings; how many there were before one."""
        last, following = len(token_ids) - 1, self._regions.next
        if not self._may_stop:
            state = self._state
            for token in token_ids:
                state = following(state, token)
            self._state = state
            # The end-of-sequence token is not text.
            return self._bytes.push(token_ids[:last] if ends_by_token else token_ids), last + 1
        raw = ""
        for i, token in enumerate(token_ids):
            before, self._state = self._state, following(self._state, token)
            if i == last and ends_by_token:
                break
            if self._calls_are_whole and "tool" in (before.region, self._state.region):
                # No stop string cuts a call into two.
                raw += self._stop.finish() + self._bytes.push([token])
                continue
            emit, self.stopped, _ = self._stop.push(self._bytes.push([token]))
            raw += emit
            if self.stopped:
                # What a step drafted beyond the stop string never happened.
                return raw, i + 1
        return raw, last + 1

    def answer(self) -> dict[str, Any]:
        """The assistant's message so far, as it would stand in the conversation."""
        output = assemble(self._parts)
        message: dict[str, Any] = {"role": "assistant", "content": output.content}
        if output.reasoning:
            message["reasoning_content"] = output.reasoning
        if output.tool_calls:
            message["tool_calls"] = [call.as_message() for call in output.tool_calls]
        return message


def _joined(parts: Sequence[Part], kind: str) -> str:
    return "".join(part.text for part in parts if isinstance(part, Piece) and part.kind == kind)
