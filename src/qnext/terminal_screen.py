"""What ``qnext chat`` shows and reads: pieces of answers, folded reasoning, typed lines."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from typing import TextIO

from qnext.answers import Delta
from qnext.prompt_history import PromptHistory

_DIM, _NORMAL, _ERASE = "\033[2m", "\033[0m", "\r\033[K"
QUOTES = '"""'
"""A line of these begins a turn of several lines, and ends it."""


class Screen:
    """Writes pieces of an answer and remarks about it.

    Reasoning is dimmed, or has a bar at the left where there is no colour. ``folds`` shows how much
    of it there is instead of what it says; ``thoughts`` keeps the text of the last answer.
    """

    def __init__(self, out: TextIO, *, folds: bool = False) -> None:
        self._out = out
        colour = out.isatty() and "NO_COLOR" not in os.environ
        self._dim, self._normal = (_DIM, _NORMAL) if colour else ("", "")
        # Without colour a bar at the left tells reasoning from the answer.
        self._bar = "" if colour else "| "
        self._rewrites = colour and os.environ.get("TERM", "dumb") != "dumb"
        self.folds = folds
        self.thoughts = ""
        self._thinking = False

    def begin(self) -> None:
        """A new answer."""
        self.thoughts, self._thinking = "", False

    def show(self, delta: Delta) -> None:
        """A piece of the answer."""
        if delta.reasoning:
            self.thoughts += delta.reasoning
            if self.folds:
                self._count(delta.usage.reasoning_tokens)
            else:
                self._think(delta.reasoning)
            self._thinking = True
        if delta.text:
            self._end_of_thinking("\n\n")
            self._write(delta.text)

    def end_of_answer(self) -> None:
        """The answer is over."""
        self._end_of_thinking("")
        self._write("\n")

    def remark(self, text: str) -> None:
        """Something that is not the model's."""
        self._write(f"{self._dim}{text}{self._normal}\n")

    def _think(self, text: str) -> None:
        if not self._thinking:
            self._write(self._dim + self._bar)
        self._write(text.replace("\n", "\n" + self._bar))

    def _count(self, tokens: int) -> None:
        if self._rewrites:
            self._write(f"{_ERASE}{self._dim}thinking, {tokens} tokens ...{self._normal}")
        elif not self._thinking:
            self._write("thinking ...")

    def _end_of_thinking(self, gap: str) -> None:
        if not self._thinking:
            return
        self._thinking = False
        if not self.folds:
            self._write(self._normal + gap)
            return
        words = len(self.thoughts.split())
        self._write(_ERASE if self._rewrites else "\n")
        self.remark(f"thought in {words} words; /thoughts shows them")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def typed_lines(history: PromptHistory | None = None) -> Iterator[str]:
    """Lines typed at a prompt, with line editing and history where the platform has them.

    ``history`` keeps them for the next run; without it the arrow keys find those of this run.
    """
    editor = None
    # Importing it is what gives input() its editing; Windows has none, its terminal edits itself.
    with suppress(ModuleNotFoundError):
        editor = import_module("readline")
    if editor is not None and history is not None:
        editor.set_auto_history(False)
        editor.clear_history()
        for line in history.lines():
            editor.add_history(line)
    continued = quoted = False
    while True:
        try:
            line = input(". " if continued or quoted else "> ")
        except EOFError:
            sys.stdout.write("\n")
            return
        if editor is not None and history is not None and history.add(line):
            editor.add_history(line)
        quoted ^= line.strip() == QUOTES
        continued = line.endswith("\\")
        yield line


def turns(lines: Iterator[str] | TextIO) -> Iterator[str]:
    """Turns: what stands between two lines of quotes is one; lines ending in a backslash are joined
    with the next; empty ones are left out."""
    held, quoted = "", False
    for line in lines:
        text = line.rstrip("\r\n")
        if text.strip() == QUOTES and (quoted or not held):
            quoted = not quoted
        elif quoted:
            held += text + "\n"
            continue
        else:
            held += text
        if held.endswith("\\") and not quoted:
            held = held[:-1] + "\n"
            continue
        if held.strip() and not quoted:
            yield held.strip()
        if not quoted:
            held = ""
    if held.strip():
        yield held.strip()
