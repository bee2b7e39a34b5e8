"""The model's answer as it streams: reasoning, content and tool calls.

``OutputParser`` composes the reasoning parser of ``parse.py`` with the reader of the checkpoint's
format of calls (``calls/``). However the text was cut into pieces, the parts add up to the same.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from qnext.text.calls.body import Body
from qnext.text.calls.coder import FUNCTION, CoderBody
from qnext.text.calls.hermes import HermesBody
from qnext.text.calls.parts import (
    CallDropped,
    CallEnd,
    Output,
    Part,
    Piece,
    assemble,
    merged,
)
from qnext.text.parse import TOOL_CLOSE, TOOL_OPEN, ReasoningParser, held_length

ToolFormat = Literal["hermes", "xml"]

_SPACES = re.compile(r"[ \t\n\r]*")


def tool_format(template: str) -> ToolFormat | None:
    """How a checkpoint writes its calls, from the source of its chat template.

    ``xml`` where the template shows the model ``<function=...>`` blocks (the Coder family), else
    ``hermes`` where it knows ``<tool_call>``; None where the template knows no tools.
    """
    if FUNCTION in template:
        return "xml"
    return "hermes" if TOOL_OPEN in template else None


class CallParser:
    """Splits content into text and tool calls.

    Newlines directly before a call belong to the format, as do those at the end of the answer after
    one. What begins like a call and is none comes out as text, every character of it.
    """

    def __init__(
        self, format: ToolFormat, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        """``tools`` are the declared tools; the XML format needs their schemas."""
        self._format, self._tools = format, tools
        self._openings = (TOOL_OPEN, FUNCTION) if format == "xml" else (TOOL_OPEN,)
        self._state: Literal["text", "call", "closing"] = "text"
        self._held = ""
        self._raw: list[str] = []
        """The text of the call that is being read, from the newlines before it."""
        self._body: Body | None = None
        self._count = 0
        self._after_call = False
        """Whether only newlines have come since the last call."""

    def push(self, text: str) -> list[Part]:
        """The parts that are certain after this text."""
        parts: list[Part] = []
        self._held += text
        steps = {"text": self._read_text, "call": self._read_call, "closing": self._read_closing}
        while self._held and steps[self._state](parts):
            pass
        return merged(parts)

    def finish(self) -> list[Part]:
        """What was held back at the end of the answer; a call that is not complete is text."""
        parts: list[Part] = []
        if self._state == "call":
            self._drop(parts)
        text, self._held = self._held, ""
        if not (self._after_call and not text.strip("\n")):
            self._add_text(parts, text)
        return merged(parts)

    # Every step returns whether there may be more to read in what is held.

    def _read_text(self, parts: list[Part]) -> bool:
        starts = [(at, tag) for tag in self._openings if (at := self._held.find(tag)) >= 0]
        if not starts:
            sure = len(self._held) - held_length(self._held, self._openings)
            sure = len(self._held[:sure].rstrip("\n"))
            self._add_text(parts, self._held[:sure])
            self._held = self._held[sure:]
            return False
        at, tag = min(starts)
        before = self._held[:at].rstrip("\n")
        self._add_text(parts, before)
        self._raw = [self._held[len(before) : at + len(tag)]]
        self._held = self._held[at + len(tag) :]
        if self._format == "xml":
            self._body = CoderBody(self._count, self._tools, is_open=tag == FUNCTION)
        else:
            self._body = HermesBody(self._count)
        self._state = "call"
        return True

    def _read_call(self, parts: list[Part]) -> bool:
        assert self._body is not None
        self._raw.append(self._held)
        self._held = self._body.push(self._held)
        parts += self._body.take_parts()
        if self._body.status == "more":
            return False
        if self._body.status == "complete":
            parts.append(CallEnd(self._count))
            self._count += 1
            self._body, self._raw, self._after_call = None, [], True
            self._state = "closing"
            return True
        # What the body did not read may hold the next call.
        raw = "".join(self._raw)
        self._raw = [raw[: len(raw) - len(self._held)]]
        self._drop(parts)
        return True

    def _read_closing(self, parts: list[Part]) -> bool:
        """The closing tag; a call that lacks it counts all the same."""
        at = _SPACES.match(self._held).end()  # type: ignore[union-attr]
        if self._held.startswith(TOOL_CLOSE, at):
            self._held = self._held[at + len(TOOL_CLOSE) :]
        elif TOOL_CLOSE.startswith(self._held[at:]):
            return False
        self._state = "text"
        return True

    def _drop(self, parts: list[Part]) -> None:
        assert self._body is not None
        parts += self._body.take_parts()
        if self._body.has_started:
            parts.append(CallDropped(self._count))
            self._count += 1
        self._body, self._state = None, "text"
        self._add_text(parts, "".join(self._raw))

    def _add_text(self, parts: list[Part], text: str) -> None:
        if text:
            self._after_call = False
            parts.append(Piece("content", text))


class OutputParser:
    """Reasoning, content and tool calls of one answer.

    ``push`` returns the parts that are certain after a piece of text, ``finish`` the rest;
    ``assemble`` makes an ``Output`` of all of them. The parts, joined, do not depend on the cuts.
    """

    def __init__(
        self,
        *,
        starts_in_reasoning: bool = False,
        split_reasoning: bool = True,
        format: ToolFormat | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """``starts_in_reasoning``: the prompt ended inside a think block. ``format`` None leaves
        calls in the content, as for a request without tools; ``tools`` are those of the request.
        """
        self._reasoning = ReasoningParser(starts_in_reasoning) if split_reasoning else None
        self._calls = CallParser(format, tools) if format is not None else None

    def push(self, text: str) -> list[Part]:
        """The parts that are certain after this text."""
        pieces = self._reasoning.push(text) if self._reasoning else [Piece("content", text)]
        return self._split(pieces)

    def finish(self) -> list[Part]:
        """The parts that were held back at the end of the answer."""
        parts = self._split(self._reasoning.finish() if self._reasoning else [])
        return merged([*parts, *(self._calls.finish() if self._calls else [])])

    def _split(self, pieces: Iterable[Piece]) -> list[Part]:
        parts: list[Part] = []
        for piece in pieces:
            if self._calls is not None and piece.kind == "content":
                parts += self._calls.push(piece.text)
            elif piece.text:
                parts.append(piece)
        return merged(parts)


def parse_output(text: str, **settings: Any) -> Output:
    """A whole answer at once; ``settings`` are those of ``OutputParser``."""
    parser = OutputParser(**settings)
    return assemble([*parser.push(text), *parser.finish()])
