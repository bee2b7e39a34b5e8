"""Answers of ``/v1/responses``: items that grow, and the events that tell of it."""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from qnext.answers import Delta
from qnext.serve.api.fields import Head
from qnext.serve.api.gathered import Gathered, LogprobsText, usage_body
from qnext.serve.events import named_event
from qnext.serve.refusals import ApiError
from qnext.text.calls.parts import CallArguments, CallDropped, CallEnd, CallStart, Part, Piece
from qnext.text.tokenizer import Tokenizer

Event = tuple[str, dict[str, Any]]

_STATUS = {"stop": "completed", "length": "incomplete", "cancelled": "cancelled"}
_CLOSING = {
    "completed": "response.completed", "incomplete": "response.incomplete",
    "cancelled": "response.incomplete", "failed": "response.failed",
}  # fmt: skip


class ResponseWriter:
    """One response."""

    def __init__(
        self,
        head: Head,
        echoed: dict[str, Any],
        *,
        tokenizer: Tokenizer | None,
        hidden_ids: Iterable[int],
        explain: bool,
    ) -> None:
        """``echoed`` are fields of the request; a tokenizer is needed for log-probabilities."""
        self._head, self._echoed, self._explain = head, echoed, explain
        self._names = LogprobsText(tokenizer, hidden_ids) if tokenizer else None
        self._found = Gathered()
        self._items: list[dict[str, Any]] = []
        self._open: str | None = None
        """Kind of the last item while it grows."""
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._number = 0
        self._error: dict[str, Any] | None = None
        self.keep: Callable[[dict[str, Any]], None] | None = None
        """Takes the whole answer, once it is there."""

    def opening(self) -> bytes:
        """The response is there, and empty."""
        body = self._body("in_progress")
        return self._write(
            [("response.created", {"response": body}), ("response.in_progress", {"response": body})]
        )

    def piece(self, index: int, delta: Delta) -> bytes:
        """Events of one delta."""
        return self._write(self._take(delta))

    def take(self, index: int, delta: Delta) -> None:
        """Note a delta without writing events."""
        for _ in self._take(delta):
            pass

    def closing(self) -> bytes:
        """The response as a whole."""
        body = self.whole()
        return self._write([(_CLOSING[body["status"]], {"response": body})])

    def failure(self, error: ApiError) -> bytes:
        """The response failed, and why."""
        self._error = {"code": error.code or error.type, "message": str(error)}
        for _ in self._close("incomplete"):
            pass
        return self._write([("response.failed", {"response": self._body("failed")})])

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        body = self._body(_STATUS[self._found.finish_reason or "cancelled"])
        if self.keep is not None:
            self.keep(body)
        return body

    # -- items -----------------------------------------------------------------------------------

    def _take(self, delta: Delta) -> Iterator[Event]:
        self._found.take(delta)
        entries = self._names.content(delta.logprobs) if self._names else []
        for part in delta.parts:
            is_text = isinstance(part, Piece) and part.kind == "content"
            yield from self._part(part, entries if is_text else [])
            if is_text:
                entries = []
        if delta.finish_reason is not None:
            yield from self._close("completed" if delta.finish_reason == "stop" else "incomplete")

    def _part(self, part: Part, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        match part:
            case Piece(kind, text):
                yield from self._switch("reasoning" if kind == "reasoning" else "message")
                self._text.append(text)
                self._logprobs += logprobs
                more = {} if kind == "reasoning" else {"logprobs": logprobs}
                name = "reasoning_text" if kind == "reasoning" else "output_text"
                yield self._at(f"response.{name}.delta", content_index=0, delta=text, **more)
            case CallStart(_, name):
                yield from self._switch("function_call", name)
            case CallArguments(_, text):
                self._text.append(text)
                yield self._at("response.function_call_arguments.delta", delta=text)
            case CallEnd():
                yield from self._close("completed")
            case CallDropped():
                yield from self._close("incomplete")

    def _switch(self, kind: str, name: str = "") -> Iterator[Event]:
        """Begin another item, unless the one of this kind still grows."""
        if self._open == kind and kind != "function_call":
            return
        yield from self._close("completed")
        self._open, self._text, self._logprobs = kind, [], []
        part: dict[str, Any] | None = None
        if kind == "function_call":
            item: dict[str, Any] = {
                "id": f"fc_{secrets.token_hex(12)}", "type": kind,
                "call_id": f"call_{secrets.token_hex(12)}", "name": name, "arguments": "",
            }  # fmt: skip
        elif kind == "reasoning":
            item = {
                "id": f"rs_{secrets.token_hex(12)}", "type": kind, "summary": [], "content": [],
            }  # fmt: skip
            part = {"type": "reasoning_text", "text": ""}
        else:
            item = {
                "id": f"msg_{secrets.token_hex(12)}", "type": kind, "role": "assistant",
                "content": [],
            }  # fmt: skip
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._items.append({**item, "status": "in_progress"})
        yield "response.output_item.added", self._place(item=dict(self._items[-1]))
        if part is not None:
            yield self._at("response.content_part.added", content_index=0, part=part)

    def _close(self, status: str) -> Iterator[Event]:
        """The item that grows is done."""
        if self._open is None:
            return
        kind, self._open = self._open, None
        item, text = self._items[-1], "".join(self._text)
        if kind == "function_call":
            item["arguments"] = text
            if status == "completed":
                yield self._at(
                    "response.function_call_arguments.done", arguments=text, name=item["name"]
                )
        else:
            reasons = kind == "reasoning"
            part: dict[str, Any] = {"type": "reasoning_text", "text": text}
            more = {}
            if not reasons:
                more = {"logprobs": self._logprobs}
                part = {"type": "output_text", "text": text, "annotations": [], **more}
            item["content"] = [part]
            name = "reasoning_text" if reasons else "output_text"
            yield self._at(f"response.{name}.done", content_index=0, text=text, **more)
            yield self._at("response.content_part.done", content_index=0, part=part)
        item["status"] = status
        yield "response.output_item.done", self._place(item=dict(item))

    def _place(self, **fields: Any) -> dict[str, Any]:
        return {"output_index": len(self._items) - 1, **fields}

    def _at(self, event: str, /, **fields: Any) -> Event:
        return event, self._place(item_id=self._items[-1]["id"], **fields)

    # -- the whole -------------------------------------------------------------------------------

    def _write(self, events: Iterable[Event]) -> bytes:
        written = []
        for name, fields in events:
            body = {"type": name, "sequence_number": self._number, **fields}
            written.append(named_event(name, body))
            self._number += 1
        return b"".join(written)

    def _body(self, status: str) -> dict[str, Any]:
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self._echoed,
            "id": self._head.id,
            "object": "response",
            "created_at": self._head.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "model": self._head.model,
            "status": status,
            "error": self._error,
            "incomplete_details": incomplete,
            "output": [dict(item) for item in self._items],
            "usage": self._usage() if self._found.usage is not None else None,
        }

    def _usage(self) -> dict[str, Any]:
        counts = usage_body([self._found], per_prompt=1, explain=self._explain)
        return {
            **({"qnext": counts["qnext"]} if self._explain else {}),
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": counts["prompt_tokens_details"],
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": counts["completion_tokens_details"],
            "total_tokens": counts["total_tokens"],
        }
