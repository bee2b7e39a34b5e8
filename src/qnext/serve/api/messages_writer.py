"""Answers of ``/v1/messages``: blocks that grow one after another."""

import json
import secrets
from collections.abc import Iterator
from typing import Any

from qnext.answers import Delta
from qnext.serve.api.fields import Head
from qnext.serve.api.gathered import Gathered
from qnext.serve.events import named_event
from qnext.serve.refusals import ApiError
from qnext.text.calls.parts import CallArguments, CallDropped, CallEnd, CallStart, Part, Piece

Event = tuple[str, dict[str, Any]]

_REASONS = {"stop": "end_turn", "length": "max_tokens", "cancelled": "pause_turn"}
"""A server that is stopped pauses the turn: sent back as it is, the answer can be gone on with."""


class MessageWriter:
    """One message."""

    def __init__(self, head: Head, *, hides_thinking: bool) -> None:
        """``hides_thinking`` sends blocks of thinking without their text."""
        self._head, self._hides = head, hides_thinking
        self._found = Gathered()
        self._blocks: list[dict[str, Any]] = []
        self._open: str | None = None
        self._text: list[str] = []
        self._stop_string: str | None = None
        self._begun = False

    def opening(self) -> bytes:
        """Nothing yet: the first event tells what of the prompt was reused."""
        return b""

    def piece(self, index: int, delta: Delta) -> bytes:
        """Events of one delta."""
        return _write(self._take(delta))

    def take(self, index: int, delta: Delta) -> None:
        """Note a delta without writing events."""
        for _ in self._take(delta):
            pass

    def closing(self) -> bytes:
        """Why the message ended, and its usage."""
        change = {"stop_reason": self._reason(), "stop_sequence": self._stop_string}
        return _write(
            [
                ("message_delta", {"delta": change, "usage": self._usage()}),
                ("message_stop", {}),
            ]
        )

    def failure(self, error: ApiError) -> bytes:
        """An error is the last event."""
        return named_event("error", error.body("anthropic"))

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        blocks = self._blocks or [{"type": "text", "text": ""}]
        return self._message(blocks, self._reason(), self._usage())

    def _take(self, delta: Delta) -> Iterator[Event]:
        self._found.take(delta)
        self._stop_string = delta.stop_string or self._stop_string
        if not self._begun:
            self._begun = True
            usage = {**self._usage(), "output_tokens": 0}
            yield "message_start", {"message": self._message([], None, usage)}
        for part in delta.parts:
            yield from self._part(part)
        if delta.finish_reason is not None:
            yield from self._close()

    def _part(self, part: Part) -> Iterator[Event]:
        match part:
            case Piece("reasoning", text):
                yield from self._switch("thinking", {"thinking": "", "signature": ""})
                if not self._hides:
                    self._text.append(text)
                    yield self._delta({"type": "thinking_delta", "thinking": text})
            case Piece(_, text):
                yield from self._switch("text", {"text": ""})
                self._text.append(text)
                yield self._delta({"type": "text_delta", "text": text})
            case CallStart(_, name):
                yield from self._close()
                named = {"id": f"toolu_{secrets.token_hex(12)}", "name": name, "input": {}}
                yield from self._switch("tool_use", named)
            case CallArguments(_, text):
                self._text.append(text)
                yield self._delta({"type": "input_json_delta", "partial_json": text})
            case CallEnd():
                yield from self._close(is_whole=True)
            case CallDropped():
                yield from self._close()

    def _switch(self, kind: str, fields: dict[str, Any]) -> Iterator[Event]:
        """Begin another block, unless the one of this kind still grows."""
        if self._open == kind:
            return
        yield from self._close()
        self._open, self._text = kind, []
        self._blocks.append({"type": kind, **fields})
        yield "content_block_start", self._at(content_block=dict(self._blocks[-1]))

    def _close(self, *, is_whole: bool = False) -> Iterator[Event]:
        """The block that grows is done; half a call is none, and its text follows."""
        if self._open is None:
            return
        kind, self._open = self._open, None
        block, text = self._blocks[-1], "".join(self._text)
        event = "content_block_stop", self._at()
        if kind == "thinking":
            block["thinking"] = text
            yield self._delta({"type": "signature_delta", "signature": ""})
        elif kind == "text":
            block["text"] = text
        elif is_whole:
            block["input"] = json.loads(text)
        else:
            block["dropped"] = True
        yield event

    def _delta(self, delta: dict[str, Any]) -> Event:
        return "content_block_delta", self._at(delta=delta)

    def _at(self, **fields: Any) -> dict[str, Any]:
        return {"index": len(self._blocks) - 1, **fields}

    def _message(
        self, blocks: list[dict[str, Any]], reason: str | None, usage: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "id": self._head.id,
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": [block for block in blocks if "dropped" not in block],
            "stop_reason": reason,
            "stop_sequence": self._stop_string if reason else None,
            "usage": usage,
        }

    def _reason(self) -> str:
        if self._found.finish_reason == "stop":
            if self._found.has_called:
                return "tool_use"
            if self._stop_string is not None:
                return "stop_sequence"
        return _REASONS[self._found.finish_reason or "cancelled"]

    def _usage(self) -> dict[str, Any]:
        usage = self._found.usage
        assert usage is not None, "asked before the first delta"
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_read_input_tokens": usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage.completion_tokens,
        }


def _write(events: Any) -> bytes:
    return b"".join(named_event(name, {"type": name, **fields}) for name, fields in events)
