"""Conversations as training data: token ids, and on which of them the model is judged.

The ids are those the checkpoint's template makes, found by rendering prefixes of the conversation
as serving does. Loss falls on what the model writes: its content, reasoning, ``</think>``, tool
calls and ``<|im_end|>``; never on role headers, on what the generation prompt holds, or on the
newline after a turn.

Where a template rewrites history (Qwen3 drops old reasoning), one conversation becomes several
samples, each ending in the turn it teaches.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qnext.errors import DataError
from qnext.text.chat import ChatTemplate
from qnext.text.parse import STOP_THINKING
from qnext.text.tokenizer import Tokenizer

Learn = Literal["assistant", "answer", "everything"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """A conversation whose last turn is the assistant's."""

    messages: tuple[Mapping[str, Any], ...]
    """As the chat template takes them: role, content, reasoning_content, tool_calls."""
    tools: tuple[Mapping[str, Any], ...] = ()
    enable_thinking: bool | None = None
    """What the prompt asks for; False puts the empty think block into the prompt."""
    learn: Learn = "assistant"
    """``assistant``: the assistant's turns. ``answer``: only what follows the last ``</think>``
    (the thinking was cut by a budget). ``everything``: all that is said, users included, in one
    sample, as pretraining does."""
    turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns are taught."""
    drop_thinking: bool = False
    """Leave out reasoning the messages hold; the think block stays and is empty."""
    cut_thinking: str | None = None
    """What was thought before a budget ended the last turn's reasoning; ``STOP_THINKING`` follows.
    """

    def __post_init__(self) -> None:
        if not self.messages or self.messages[-1].get("role") != "assistant":
            raise DataError("a chat sample must end with an assistant turn.")


@dataclass(frozen=True, slots=True)
class Sample:
    """One training document."""

    ids: list[int]
    weights: list[int]
    judged: str
    """The text the model is judged on."""


@dataclass
class ChatEncoder:
    """Turns chats into samples with one template and one tokenizer."""

    template: ChatTemplate
    tokenizer: Tokenizer
    _ends: tuple[int, int] = field(init=False, repr=False)
    _blank: frozenset[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        end, close = self.tokenizer.id_of("<|im_end|>"), self.tokenizer.id_of("</think>")
        if end is None or close is None:
            raise DataError(
                f"{self.tokenizer.origin} lacks <|im_end|> or </think>: chats cannot be encoded."
            )
        self._ends = (end, close)
        self._blank = frozenset(self.tokenizer.encode("\n\n") + self.tokenizer.encode("\n"))

    def samples(self, chat: Chat) -> Iterator[Sample]:
        """The samples of one conversation. Raises DataError when prefixes do not fit together."""
        messages = [dict(message) for message in chat.messages]
        if chat.drop_thinking:
            messages = [_without_reasoning(message) for message in messages]
        if chat.learn == "everything":
            yield self._everything(messages, chat)
            return
        places = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if chat.turns == "last":
            places = places[-1:]
        waiting: tuple[list[int], list[int]] | None = None
        for place in places:
            ids, start = self._turn(messages[: place + 1], chat)
            weights = [0] * start + [1] * (len(ids) - start)
            if waiting is not None:
                old_ids, old_weights = waiting
                if ids[: len(old_ids)] == old_ids:
                    weights[: len(old_ids)] = old_weights
                else:
                    yield self._sample(old_ids, old_weights)
            waiting = ids, weights
        assert waiting is not None
        ids, weights = waiting
        if chat.learn == "answer":
            start = len(ids) - ids[::-1].index(self._ends[1])
            # The blank line after the tag is part of what the budget wrote.
            while ids[start] in self._blank:
                start += 1
            weights = [0] * start + [1] * (len(ids) - start)
        yield self._sample(ids, weights)

    def _turn(self, messages: list[dict[str, Any]], chat: Chat) -> tuple[list[int], int]:
        """(ids up to and with the last turn's <|im_end|>, where the assistant begins to write)."""
        prompt = self._encode(messages[:-1], chat, prompt=True)
        if chat.cut_thinking is not None and len(messages) == len(chat.messages):
            # Piece by piece, as an engine puts them together: no token spans two of them.
            answer = messages[-1]["content"] + "<|im_end|>"
            parts = ("<think>\n", chat.cut_thinking, STOP_THINKING, answer)
            written = [token for part in parts for token in self.tokenizer.encode(part)]
            return prompt + written, len(prompt)
        whole = self._encode(messages, chat, prompt=False)
        end = self._ends[0]
        length = len(whole) - whole[::-1].index(end)
        if whole[: len(prompt)] != prompt or length <= len(prompt):
            raise DataError(
                f"{self.template.origin}: the rendering of {len(messages)} messages does not begin "
                "with the prompt that asks for the last of them, so what the model would write is "
                f"not known. Prompt ends in {self.tokenizer.decode(prompt[-12:])!r}."
            )
        return whole[:length], len(prompt)

    def _everything(self, messages: list[dict[str, Any]], chat: Chat) -> Sample:
        ids = self._encode(messages, chat, prompt=False)
        end = self._ends[0]
        ids = ids[: len(ids) - ids[::-1].index(end)]
        header = self.tokenizer.id_of("<|im_start|>")
        newline = self.tokenizer.encode("\n")
        weights, inside = [], False
        for at, token in enumerate(ids):
            if token == header:
                inside = False
            weights.append(int(inside))
            if token == end:
                inside = False
            elif not inside and ids[at - len(newline) + 1 : at + 1] == newline:
                inside = ids[at - len(newline)] != end
        return self._sample(ids, weights)

    def _encode(self, messages: list[dict[str, Any]], chat: Chat, *, prompt: bool) -> list[int]:
        options: dict[str, Any] = {"add_generation_prompt": prompt}
        if chat.enable_thinking is not None:
            options["enable_thinking"] = chat.enable_thinking
        return self.template.encode(
            messages, self.tokenizer, tools=list(chat.tools) or None, **options
        )

    def _sample(self, ids: list[int], weights: list[int]) -> Sample:
        judged = [token for token, weight in zip(ids, weights, strict=True) if weight]
        if not judged:
            raise DataError("a chat sample has no token the model is judged on.")
        return Sample(ids, weights, self.tokenizer.decode(judged, skip_special=True))


def _without_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in message.items() if key != "reasoning_content"}
    content = kept.get("content")
    if message["role"] == "assistant" and isinstance(content, str) and "</think>" in content:
        kept["content"] = content.rpartition("</think>")[2].lstrip("\n")
    return kept


def chat_from_row(row: Mapping[str, Any], where: str) -> Chat:
    """The chat of a JSON row: ``messages``, and optionally ``tools``, ``enable_thinking``,
    ``learn`` and ``turns``. Raises DataError for anything the template could not take.
    """
    messages = row.get("messages")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError(f"{where}: messages: expected a list of messages.")
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ("system", "user", "assistant", "tool"):
            raise DataError(
                f"{where}: messages[{number}].role: expected system, user, assistant or tool, "
                f"found {role!r}."
            )
    last = max(
        (n for n, message in enumerate(messages) if message["role"] == "assistant"), default=-1
    )
    if last < 0:
        raise DataError(f"{where}: no message has the role assistant: there is nothing to learn.")
    options = {k: row[k] for k in ("enable_thinking", "learn", "turns") if row.get(k) is not None}
    # Columns of a Parquet file are there in every message, empty where they do not apply.
    kept = [{k: v for k, v in message.items() if v is not None} for message in messages[: last + 1]]
    return Chat(messages=tuple(kept), tools=tuple(row.get("tools") or ()), **options)
