"""Which part of a conversation's prompt will still be there in the next turn.

Templates rewrite history: reasoning is dropped once the user speaks again, and the generation
prompt gives way to the answer. Where a saved state should lie is therefore not the end of the
prompt but the longest beginning that the next prompt shares with it. It is found by rendering: the
conversation as it is, and as it would be one turn later.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qnext.errors import TemplateError
from qnext.text.chat import ChatTemplate
from qnext.text.tokenizer import Tokenizer

# Two texts that share no beginning, so that nothing of them is taken for stable.
_STAND_INS = ("A", "zz")


def stable_lengths(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    ids: Sequence[int],
    options: Mapping[str, Any],
) -> tuple[tuple[int, str], ...]:
    """(tokens, why) of beginnings of the prompt ``ids`` that later prompts will share.

    "stable" is what the next turn of this conversation keeps; "system" is what every conversation
    with the same system message and tools has; "loop", if there are tools, is what is kept while
    the model calls them, before the user speaks again. Empty for a conversation that the template
    cannot carry on.
    """
    found = []
    if messages and not options.get("continue_final_message"):
        system = _until_first_user(template, tokenizer, messages, ids, options)
        if system:
            found.append((system, "system"))
        stable = _next_turn(template, tokenizer, messages, ids, options)
        if stable > system:
            found.append((stable, "stable"))
        loop = _in_the_loop(template, tokenizer, messages, ids, options)
        if loop > stable:
            found.append((loop, "loop"))
    return tuple(found)


def beginning_after(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    answer: Mapping[str, Any],
    options: Mapping[str, Any],
) -> list[int]:
    """How the prompt of the next user message begins, once ``answer`` ends this conversation.

    The ids up to the user's first word, and one more: whatever follows. Empty when the template
    cannot carry the conversation on.
    """
    if options.get("continue_final_message"):
        return []
    turns = [[*messages, answer, {"role": "user", "content": text}] for text in _STAND_INS]
    try:
        one, two = (template.encode(turn, tokenizer, **options) for turn in turns)
    except TemplateError:
        return []
    return one[: _common(one, two) + 1]


def _next_turn(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    ids: Sequence[int],
    options: Mapping[str, Any],
) -> int:
    turns = [
        [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": text}]
        for text in _STAND_INS
    ]
    return _shared(template, tokenizer, turns, ids, options)


def _in_the_loop(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    ids: Sequence[int],
    options: Mapping[str, Any],
) -> int:
    """Tokens that stay when the answer is a call and its result follows."""
    if not options.get("tools"):
        return 0
    rounds = [
        [
            *messages,
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": text,
                "tool_calls": [{"name": text, "arguments": {}}],
            },
            {"role": "tool", "content": text},
        ]
        for text in _STAND_INS
    ]
    return _shared(template, tokenizer, rounds, ids, options)


def _until_first_user(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    ids: Sequence[int],
    options: Mapping[str, Any],
) -> int:
    """Tokens before the first user message, if something stands there that others will share."""
    has_tools = bool(options.get("tools"))
    if messages[0].get("role") != "system" and not has_tools:
        return 0
    leading = [messages[0]] if messages[0].get("role") == "system" else []
    starts = [[*leading, {"role": "user", "content": text}] for text in _STAND_INS]
    return _shared(template, tokenizer, starts, ids, options)


def _shared(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    versions: Sequence[Sequence[Mapping[str, Any]]],
    ids: Sequence[int],
    options: Mapping[str, Any],
) -> int:
    shared = len(ids)
    for version in versions:
        try:
            other = template.encode(version, tokenizer, **options)
        except TemplateError:
            return 0  # such a turn cannot follow; there is nothing to prepare for
        shared = min(shared, _common(ids, other))
    return shared


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of equal tokens at the beginning."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
