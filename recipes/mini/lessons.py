"""Lessons: conversations with loss on the assistant, thinking and not thinking in one model.

The user's ``/think`` and ``/no_think`` and the prompt's empty think block ask for a mode; the same
questions are taught in both. Some think blocks are cut by a budget: the model learns to answer
from what it has, not to write the sentence that cuts.
"""

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

from recipes.mini import smalltalk
from recipes.mini.story_chats import story_chat

from qnext.data.chats import Chat
from qnext.data.generate import arithmetic, reasoning, recall, stories
from qnext.data.generate.exercise import Exercise
from qnext.data.generate.tools import tool_chat

SYSTEM = ("You are a helpful assistant.", "Answer in simple English.", "Be short.")


def _asked(question: str, answer: str, thought: str = "", **options: Any) -> Chat:
    reply: dict[str, Any] = {"role": "assistant", "content": answer}
    if thought:
        reply["reasoning_content"] = thought
    return Chat(messages=({"role": "user", "content": question}, reply), **options)


def with_mode(rng: Random, chat: Chat) -> Chat:
    """A chat without reasoning in one of its modes: half with the block in the prompt, some with
    a flag, the rest as the model would begin by itself, with an empty block.
    """
    if chat.enable_thinking is not None or chat.messages[-1].get("reasoning_content"):
        return chat
    choice = rng.random()
    if choice < 0.5:
        return replace(chat, enable_thinking=False)
    if choice < 0.56:
        return _flagged(chat, " /no_think")
    return chat


def _flagged(chat: Chat, flag: str) -> Chat:
    messages = list(chat.messages)
    at = max(n for n, message in enumerate(messages) if message["role"] == "user")
    messages[at] = {**messages[at], "content": messages[at]["content"] + flag}
    return replace(chat, messages=tuple(messages))


def _under_system(rng: Random, chat: Chat, share: float = 0.06) -> Chat:
    if rng.random() >= share:
        return chat
    system = {"role": "system", "content": rng.choice(SYSTEM)}
    return replace(chat, messages=(system, *chat.messages))


def thinking(rng: Random, made: Exercise) -> Chat:
    """Worked in the think block; sometimes cut by a budget, or asked for against the flag."""
    choice = rng.random()
    if choice < 0.05:
        return cut(rng, made)
    chat = _asked(made.question, made.answer, made.trace)
    if choice < 0.10:
        return _flagged(chat, " /think")
    if choice < 0.13:
        # Flags of both kinds: the last one wins.
        return _flagged(_flagged(chat, " /no_think"), " /think")
    return _under_system(rng, chat)


def cut(rng: Random, made: Exercise) -> Chat:
    """A trace that ends early, the sentence the engine writes then, and the answer."""
    words = made.trace.split(" ")
    kept = " ".join(words[: rng.randint(0, max(0, len(words) - 1))])
    return _asked(made.question, made.answer, cut_thinking=kept, learn="answer")


def direct(rng: Random, made: Exercise) -> Chat:
    """The answer alone."""
    choice = rng.random()
    if choice < 0.85:
        return _under_system(rng, _asked(made.question, made.answer, enable_thinking=False))
    if choice < 0.97:
        return _flagged(_asked(made.question, made.answer), " /no_think")
    return _flagged(_flagged(_asked(made.question, made.answer), " /think"), " /no_think")


def _sums_thinking(rng: Random) -> Chat:
    return thinking(rng, arithmetic.calculation(rng))


def _sums_direct(rng: Random) -> Chat:
    return direct(rng, arithmetic.calculation(rng, thinking=False))


def _problems_thinking(rng: Random) -> Chat:
    return thinking(rng, reasoning.word_problem(rng))


def _small_thinking(rng: Random) -> Chat:
    return thinking(rng, reasoning.small(rng))


def _problems_direct(rng: Random) -> Chat:
    made = reasoning.word_problem(rng) if rng.random() < 0.4 else reasoning.small(rng)
    return direct(rng, made)


def _several_sums(rng: Random) -> Chat:
    """Two or three sums in one conversation, each answered in its own mode; the last is taught."""
    messages: list[dict[str, Any]] = []
    for _ in range(rng.randint(1, 2)):
        made = arithmetic.calculation(rng)
        messages += [
            {"role": "user", "content": made.question},
            {"role": "assistant", "content": made.answer},
        ]
    last = thinking(rng, arithmetic.calculation(rng))
    if last.messages[0]["role"] == "system":
        messages.insert(0, dict(last.messages[0]))
        last = replace(last, messages=last.messages[1:])
    return replace(last, messages=(*messages, *last.messages), turns="last")


def _stories(rng: Random) -> Chat:
    return with_mode(rng, story_chat(rng).chat("assistant"))


def _smalltalk(rng: Random) -> Chat:
    return with_mode(rng, smalltalk.smalltalk_chat(rng).chat("assistant"))


def _recall(rng: Random) -> Chat:
    """Short needles: a fact in a few sentences, asked at once."""
    sentences = stories.haystack(rng, rng.randint(100, 900))
    made = recall.needle(
        rng, sentences, depth=rng.random(), distractors=rng.choice((0, 1, 2, 3)), held_out=False
    )
    chat = made.chat()
    return chat if rng.random() < 0.7 else replace(chat, enable_thinking=None)


LESSONS: dict[str, tuple[Callable[[Random], Chat], int]] = {
    "sums_thinking_chat": (_sums_thinking, 30_000),
    "sums_direct_chat": (_sums_direct, 60_000),
    "several_sums_chat": (_several_sums, 3_000),
    "problems_thinking_chat": (_problems_thinking, 10_000),
    "small_thinking_chat": (_small_thinking, 9_000),
    "problems_direct_chat": (_problems_direct, 8_000),
    "template_stories_chat": (_stories, 5_000),
    "smalltalk_chat": (_smalltalk, 9_000),
    "tools_chat": (tool_chat, 6_000),
    "recall_chat": (_recall, 3_000),
}
"""Source -> (maker, how many)."""
