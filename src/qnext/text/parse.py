"""Streams of the model's text: split off reasoning, stop at stop strings.

Both take text in pieces of any size and hold back only what could still turn into a tag or a stop
string; how the text was cut never changes the result. Tool calls are in ``output.py``, which builds
on this; text to ids and back is in ``tokenizer.py``.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from qnext.errors import RequestError
from qnext.text.calls.parts import Kind, Piece

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
TOOL_OPEN, TOOL_CLOSE = "<tool_call>", "</tool_call>"
STOP_THINKING = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the "
    "thinking directly now.\n</think>\n\n"
)
"""Inserted when the thinking budget is used up: the sentence of the Qwen3 report, as the official
documentation spells it (arXiv 2505.09388, section 4.3; QwenLM/Qwen3, thinking_budget.md)."""


class ReasoningParser:
    r"""Splits a model's answer into reasoning and content.

    The answer is ``<think>\nREASONING\n</think>\n\nCONTENT``; where the prompt already opened the
    block (``opens_thinking``), it starts inside. Tags and the newlines around them belong to the
    format and are in neither part. A ``<tool_call>`` inside reasoning ends it and begins the
    content; a further ``</think>`` in the content is dropped, unless it stands inside a call. An
    answer that does not start with ``<think>`` (and was not started inside) is content, unchanged.
    If the answer ends inside the block, all of it is reasoning.
    """

    def __init__(self, start_in_reasoning: bool) -> None:
        self._state: Literal["start", "reasoning", "content"] = "start"
        self._starts_inside = start_in_reasoning
        self._held = ""
        # Newlines at the beginning of reasoning, and of content after it, belong to the tags.
        self._skips_newlines = False
        self._has_closed = False
        self._in_call = False

    @property
    def in_reasoning(self) -> bool:
        """Whether text that arrives now would be reasoning, as far as can be told."""
        return self._state == "reasoning" or (self._state == "start" and self._starts_inside)

    def push(self, text: str) -> list[Piece]:
        """The pieces that are certain after this text; neighbours never have the same kind."""
        self._held += text
        pieces: list[Piece] = []
        if self._state == "start" and not self._start():
            return pieces
        if self._state == "reasoning":
            self._read_reasoning(pieces)
        if self._state == "content":
            self._read_content(pieces)
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back at the end of the answer: it became no tag, so it is text."""
        text, self._held = self._held, ""
        if self._skips_newlines or (self._state == "start" and self._starts_inside):
            text = text.lstrip("\n")
        return [Piece("reasoning" if self.in_reasoning else "content", text)] if text else []

    def _start(self) -> bool:
        """Decide what the answer begins with; False while that is open."""
        text = self._held.lstrip("\n")
        if THINK_OPEN.startswith(text) and text != THINK_OPEN:
            return False
        has_tag = text.startswith(THINK_OPEN)
        if has_tag or self._starts_inside:
            self._held = text.removeprefix(THINK_OPEN)
            self._state, self._skips_newlines = "reasoning", True
        else:
            self._state = "content"
        return True

    def _read_reasoning(self, pieces: list[Piece]) -> None:
        self._skip_newlines()
        ends = [(self._held.find(tag), tag) for tag in (THINK_CLOSE, TOOL_OPEN)]
        end, tag = min((found for found in ends if found[0] >= 0), default=(-1, ""))
        if end >= 0:
            self._append(pieces, "reasoning", self._held[:end].rstrip("\n"))
            self._held = self._held[end:].removeprefix(THINK_CLOSE)
            self._state, self._has_closed = "content", True
            self._skips_newlines = tag == THINK_CLOSE
            return
        sure = len(self._held) - held_length(self._held, (THINK_CLOSE, TOOL_OPEN))
        sure = len(self._held[:sure].rstrip("\n"))
        self._append(pieces, "reasoning", self._held[:sure])
        self._held = self._held[sure:]

    def _read_content(self, pieces: list[Piece]) -> None:
        while found := self._next_tag():
            at, tag = found
            if tag != THINK_CLOSE:
                self._in_call = tag == TOOL_OPEN
            kept = at if tag == THINK_CLOSE else at + len(tag)
            before, after = self._held[:kept], self._held[at + len(tag) :]
            self._held = before
            self._skip_newlines()
            self._append(pieces, "content", self._held)
            self._held = after
        self._skip_newlines()
        sure = len(self._held) - held_length(self._held, self._content_tags())
        self._append(pieces, "content", self._held[:sure])
        self._held = self._held[sure:]

    def _content_tags(self) -> tuple[str, ...]:
        """Tags that matter in the content now; none where no block was closed."""
        if not self._has_closed:
            return ()
        return (TOOL_CLOSE,) if self._in_call else (THINK_CLOSE, TOOL_OPEN)

    def _next_tag(self) -> tuple[int, str] | None:
        found = [(at, tag) for tag in self._content_tags() if (at := self._held.find(tag)) >= 0]
        return min(found, default=None)

    def _skip_newlines(self) -> None:
        if self._skips_newlines:
            self._held = self._held.lstrip("\n")

    def _append(self, pieces: list[Piece], kind: Kind, text: str) -> None:
        if not text:
            return
        self._skips_newlines = False
        if pieces and pieces[-1].kind == kind:
            text = pieces.pop().text + text
        pieces.append(Piece(kind, text))


class StopResult(NamedTuple):
    """What a push to a StopMatcher gives."""

    emit: str
    """Text that is certainly not part of a stop string."""
    stopped: bool
    matched: str | None
    """The stop string that ended the text."""


class StopMatcher:
    """Ends a text at the first stop string, of which no part is ever returned.

    The first is the one that is complete first; of several that end at the same character, the
    longest.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """``stop`` may be empty. Raises RequestError for an empty string among them."""
        if isinstance(stop, str):
            stop = [stop]
        for index, text in enumerate(stop):
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop[{index}]: expected a non-empty str, got {text!r}.")
        self._stop = tuple(stop)
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._matched

    def push(self, text: str) -> StopResult:
        """Take in text; after a stop string has matched, everything further is ignored."""
        if self._matched is not None:
            return StopResult("", True, self._matched)
        self._held += text
        found = [
            (start + len(stop), start, stop)
            for stop in self._stop
            if (start := self._held.find(stop)) >= 0
        ]
        if found:
            _, start, self._matched = min(found)
            emit, self._held = self._held[:start], ""
            return StopResult(emit, True, self._matched)
        sure = len(self._held) - held_length(self._held, self._stop)
        emit, self._held = self._held[:sure], self._held[sure:]
        return StopResult(emit, False, None)

    def finish(self) -> str:
        """What was held back at the end: the beginning of a stop string, but not the whole."""
        text, self._held = self._held, ""
        return text


def held_length(text: str, wanted: Sequence[str]) -> int:
    """Length of the longest end of ``text`` with which a longer wanted string begins."""
    longest = max((len(one) for one in wanted), default=0) - 1
    for length in range(min(longest, len(text)), 0, -1):
        end = text[-length:]
        if any(len(one) > length and one.startswith(end) for one in wanted):
            return length
    return 0
