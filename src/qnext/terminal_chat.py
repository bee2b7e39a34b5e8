r"""``qnext chat``: a conversation in the terminal, or over a pipe with one turn per line.

Answers stream; reasoning is shown dimmed, or with a bar at the left where there is no colour. A
line that ends in a backslash goes on in the next one. Ctrl-C ends the answer that is being
written; at the prompt it leaves, as do /quit and the end of the input.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import FrameType
from typing import TextIO

from qnext.engine.request import SamplingParams
from qnext.errors import QnextError
from qnext.llm import LLM, Delta

HELP = """\
/reset            forget the conversation
/system TEXT      set the system message (without TEXT: remove it) and forget the conversation
/think, /no_think let the model think before it answers, or not
/quit             leave
A line that ends in \\ goes on in the next one. Ctrl-C ends an answer."""

_COMMAND = re.compile(r"/([a-z_]+)(?:\s+(.*))?", re.DOTALL)
_DIM, _NORMAL = "\033[2m", "\033[0m"


class TerminalChat:
    """One conversation with one model."""

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        *,
        system: str | None = None,
        enable_thinking: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``enable_thinking`` None leaves it to the model; ``clock`` measures the speed shown."""
        self._llm, self._params, self._clock = llm, params, clock
        self._system, self._enable_thinking = system, enable_thinking
        self.turns: list[dict[str, str]] = []
        """User and assistant messages so far."""

    def run(self, source: TextIO, out: TextIO) -> int:
        """Talk until /quit or the end of ``source``; returns the exit status.

        On a terminal a failed turn is reported and the conversation goes on; over a pipe its error
        is raised (QnextError), so that a script notices.
        """
        interactive = source.isatty() and out.isatty()
        screen = _Screen(out, colour=out.isatty() and "NO_COLOR" not in os.environ)
        lines = _typed_lines() if interactive else source
        if interactive:
            screen.remark(f"{self._llm.name}; /help lists the commands, /quit leaves")
        for text in _joined(lines):
            if _is_quit(text):
                break
            try:
                self._turn(text, screen, interactive)
            except QnextError as error:
                if not interactive:
                    raise
                screen.remark(f"{error} (/reset forgets the conversation)")
        return 0

    def _turn(self, text: str, screen: "_Screen", interactive: bool) -> None:
        command = _COMMAND.fullmatch(text)
        if command is None:
            self._answer(text, screen, interactive)
            return
        name, rest = command.group(1), (command.group(2) or "").strip()
        if name == "reset":
            self.turns.clear()
            screen.remark("the conversation is forgotten")
        elif name == "system":
            self._system = rest or None
            self.turns.clear()
            screen.remark(f"system message: {rest}" if rest else "no system message")
        elif name in ("think", "no_think"):
            self._enable_thinking = name == "think"
            screen.remark("thinking is on" if self._enable_thinking else "thinking is off")
            if rest:
                self._answer(rest, screen, interactive)
        elif name == "help":
            screen.remark(HELP)
        else:
            screen.remark(f"there is no command /{name}; /help lists them")

    def _answer(self, text: str, screen: "_Screen", interactive: bool) -> None:
        system = [{"role": "system", "content": self._system}] if self._system else []
        user = {"role": "user", "content": text}
        began, first, last, answer = self._clock(), None, None, ""
        deltas = self._llm.stream(
            [*system, *self.turns, user], self._params, enable_thinking=self._enable_thinking
        )
        with _interruptible(interactive) as is_interrupted:
            for delta in deltas:
                first = first or self._clock()
                screen.show(delta)
                answer += delta.text
                last = delta
                if is_interrupted():
                    break
        screen.end_of_answer()
        # Old reasoning stays out of the history, as the models were trained.
        self.turns += [user, {"role": "assistant", "content": answer}]
        if interactive and last is not None and first is not None:
            screen.remark(_summary(last, first - began, self._clock() - first))


class _Screen:
    """Writes pieces of an answer and remarks about it."""

    def __init__(self, out: TextIO, *, colour: bool) -> None:
        self._out = out
        self._dim, self._normal = (_DIM, _NORMAL) if colour else ("", "")
        # Without colour a bar at the left tells reasoning from the answer.
        self._bar = "" if colour else "| "
        self._thinking = False

    def show(self, delta: Delta) -> None:
        if delta.reasoning:
            if not self._thinking:
                self._write(self._dim + self._bar)
                self._thinking = True
            self._write(delta.reasoning.replace("\n", "\n" + self._bar))
        if delta.text:
            self._end_of_thinking()
            self._write(delta.text)

    def end_of_answer(self) -> None:
        if self._thinking:
            self._write(self._normal)
            self._thinking = False
        self._write("\n")

    def remark(self, text: str) -> None:
        self._write(f"{self._dim}{text}{self._normal}\n")

    def _end_of_thinking(self) -> None:
        if self._thinking:
            self._write(f"{self._normal}\n\n")
            self._thinking = False

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def _typed_lines() -> Iterator[str]:
    """Lines typed at a prompt, with line editing and history where the platform has them."""
    # Importing it is what gives input() its editing; Windows has none, its terminal edits itself.
    with suppress(ModuleNotFoundError):
        import_module("readline")
    continued = False
    while True:
        try:
            line = input(". " if continued else "> ")
        except EOFError:
            sys.stdout.write("\n")
            return
        continued = line.endswith("\\")
        yield line


def _joined(lines: Iterator[str] | TextIO) -> Iterator[str]:
    """Turns: lines ending in a backslash are joined with the next; empty ones are left out."""
    held = ""
    for line in lines:
        held += line.rstrip("\r\n")
        if held.endswith("\\"):
            held = held[:-1] + "\n"
            continue
        if held.strip():
            yield held.strip()
        held = ""
    if held.strip():
        yield held.strip()


def _is_quit(text: str) -> bool:
    return text in ("/quit", "/exit")


@contextmanager
def _interruptible(interactive: bool) -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a flag, so that the engine finishes its step; a second one raises.

    Over a pipe nothing changes: Ctrl-C raises KeyboardInterrupt at once.
    """
    count = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt

    if not interactive:
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, before)


def _summary(last: Delta, first_s: float, rest_s: float) -> str:
    tokens = last.usage.completion_tokens
    parts = [f"{tokens} tokens", f"first after {first_s:.2f} s"]
    if tokens > 1 and rest_s > 0:
        parts.append(f"{(tokens - 1) / rest_s:.1f} tokens/s")
    if last.finish_reason == "length":
        parts.append("cut off: the limit of tokens is reached")
    elif last.finish_reason is None:
        parts.append("interrupted")
    return ", ".join(parts)
