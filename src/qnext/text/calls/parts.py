"""What a model's answer consists of, piece by piece, and how the pieces make the whole.

A call is announced (``CallStart``), pieces of its arguments' JSON text follow (``CallArguments``),
and it ends in one of two ways. ``CallEnd``: it is well formed, and its pieces, joined, are one JSON
object. ``CallDropped``: the model broke off or made a mistake after the call was announced; its
pieces, joined, are an unfinished JSON text that no parser accepts, and the text of the call follows
as content. Nobody can act on half a call by mistake, and no character is lost.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["reasoning", "content"]


class Piece(NamedTuple):
    """A stretch of output text and what it is."""

    kind: Kind
    text: str


class CallStart(NamedTuple):
    """A tool call begins. Its id is the server's business."""

    index: int
    """Number of the call in this answer, from 0; dropped calls count."""
    name: str


class CallArguments(NamedTuple):
    """A piece of the arguments' JSON text."""

    index: int
    text: str


class CallEnd(NamedTuple):
    """The call is complete, and its arguments are a JSON object."""

    index: int


class CallDropped(NamedTuple):
    """The call turned out not to be one; its whole text follows as content."""

    index: int


Part = Piece | CallStart | CallArguments | CallEnd | CallDropped


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool."""

    name: str
    arguments: str
    """A JSON object as text, as the model wrote it (converted, where the format is XML)."""

    def as_message(self) -> dict[str, object]:
        """The call as it stands in ``tool_calls`` of an assistant's message, without an id."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Output:
    """A whole answer."""

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]


def assemble(parts: Iterable[Part]) -> Output:
    """The answer that a stream of parts adds up to."""
    texts: dict[Kind, list[str]] = {"reasoning": [], "content": []}
    names: dict[int, str] = {}
    arguments: dict[int, list[str]] = {}
    ended = []
    for part in parts:
        match part:
            case Piece(kind, text):
                texts[kind].append(text)
            case CallStart(index, name):
                names[index], arguments[index] = name, []
            case CallArguments(index, text):
                arguments[index].append(text)
            case CallEnd(index):
                ended.append(ToolCall(names[index], "".join(arguments[index])))
            case CallDropped():
                pass
    return Output("".join(texts["reasoning"]), "".join(texts["content"]), tuple(ended))


def merged(parts: Iterable[Part]) -> list[Part]:
    """The parts with neighbours of the same kind joined."""
    joined: list[Part] = []
    last: Piece | CallArguments | None = None
    texts: list[str] = []  # of the last one, and of those that go on from it
    for part in parts:
        joins = isinstance(part, (Piece, CallArguments))
        # The first field is the kind of a piece, the number of a call.
        if joins and last is not None and type(part) is type(last) and part[0] == last[0]:
            texts.append(part[1])
            continue
        if last is not None and len(texts) > 1:
            joined[-1] = last._replace(text="".join(texts))
        joined.append(part)
        last, texts = (part, [part.text]) if joins else (None, [])
    if last is not None and len(texts) > 1:
        joined[-1] = last._replace(text="".join(texts))
    return joined
