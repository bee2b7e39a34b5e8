"""Where in an answer a token stands: in the reasoning, in the answer itself, in a tool call.

One machine per format, over token ids; a state is a small immutable value, so a state after drafts
is computed and thrown away like any number. Text that merely spells a tag with ordinary tokens is
no tag where the vocabulary has a token for it. Where it has none, the tag is looked for in the
bytes, and the region changes behind the token that completes it.

    reasoning --</think>--> content --<tool_call>--> tool --</tool_call>--> content
    reasoning ------------- <tool_call> -----------> tool        (the reasoning is over for good)
    content   --<think>---> reasoning                            (at the start of an answer only)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Region = Literal["reasoning", "content", "tool"]

MAX_LEAD = 2
"""Newlines after ``</think>`` that belong to the format, not to the answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tag:
    """A tag of the chat format: one token, or else the bytes it is spelled with."""

    text: bytes
    id: int | None


class State(NamedTuple):
    """Where an answer has got to."""

    region: Region
    thought: int = 0
    """Tokens of the reasoning so far, tags excluded."""
    begun: bool = False
    """Whether anything but newlines stands there; before that an answer may open a think block."""
    said: bool = False
    """Whether the answer itself has begun, behind reasoning and newlines."""
    lead: int | None = None
    """Newlines that may still follow a closing tag; None where that is over, or never was."""
    calls: int = 0
    """Tool calls begun."""
    tail: bytes = b""
    """Last bytes of the answer, where tags have no tokens of their own."""


class Regions:
    """The tags of a format, and where an answer starts.

    ``think`` and ``tool`` are what opens and what closes them. ``may_think`` says whether an answer
    that does not start in the reasoning may open it. ``newlines`` maps the tokens that are made of
    newlines only to their number. ``spell`` gives the bytes of a token; it is needed where a tag
    has no token.
    """

    def __init__(
        self,
        *,
        think: tuple[Tag, Tag],
        tool: tuple[Tag, Tag],
        starts_in: Region = "content",
        may_think: bool = True,
        newlines: Mapping[int, int] | None = None,
        spell: Callable[[int], bytes] | None = None,
    ) -> None:
        self.think, self.tool = think, tool
        self.starts_in: Region = starts_in
        self.may_think, self.newlines = may_think, newlines or {}
        tags = {"think": think[0], "end": think[1], "call": tool[0], "back": tool[1]}
        self._ids = {tag.id: name for name, tag in tags.items() if tag.id is not None}
        self._texts = [(name, tag.text) for name, tag in tags.items() if tag.id is None]
        assert spell is not None or not self._texts, "tags in text need the tokens' bytes"
        self._spell = spell
        self._reach = max((len(text) for _, text in self._texts), default=0)

    def start(self) -> State:
        """Before the first token."""
        return State(self.starts_in)

    def next(self, state: State, token: int) -> State:
        """After one more token."""
        tag, tail = self._ids.get(token), state.tail
        if self._texts and tag is None:
            tag, tail = self._read(tail, token)
            state = state._replace(tail=tail)
        region = state.region
        if region == "reasoning":
            if tag == "end":
                return state._replace(region="content", begun=True, lead=MAX_LEAD)
            if tag == "call":
                return self._call(state)
            return state._replace(thought=state.thought + 1)
        if region == "tool":
            return state._replace(region="content", lead=1) if tag == "back" else state
        if tag == "call":
            return self._call(state)
        if tag == "think" and self.may_think and not state.begun:
            return state._replace(region="reasoning", begun=True)
        count = self.newlines.get(token, 0)
        if count:
            if state.lead is None:
                return state
            left = state.lead - count
            return state._replace(lead=left if left > 0 else None)
        if state.said and state.lead is None:
            return state
        return state._replace(begun=True, said=True, lead=None)

    def _call(self, state: State) -> State:
        calls = state.calls + 1
        return state._replace(region="tool", begun=True, said=True, lead=None, calls=calls)

    def _read(self, tail: bytes, token: int) -> tuple[str | None, bytes]:
        """The tag that a token completes, and the last bytes for the next one."""
        assert self._spell is not None
        text = tail + self._spell(token)
        for name, wanted in self._texts:
            at = text.find(wanted)
            # It must end in the new token, or it was seen before.
            if at >= 0 and at + len(wanted) > len(tail):
                return name, text[at + len(wanted) :][-self._reach :]
        return None, text[-self._reach :]
