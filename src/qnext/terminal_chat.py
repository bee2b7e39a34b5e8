r"""``qnext chat``: a conversation in the terminal, or over a pipe with one turn per line.

Answers stream; on a terminal reasoning is folded into a line that counts it. A line that ends in a
backslash goes on in the next one; three quotes on a line of their own begin and end a longer text.
Ctrl-C ends the answer that is being written; at the prompt it leaves, as do /quit and the end of
the input.
"""

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from qnext.engine.request import SamplingParams
from qnext.errors import QnextError, RequestError
from qnext.llm import LLM, Delta
from qnext.prompt_history import PromptHistory
from qnext.terminal_screen import Screen, turns, typed_lines

HELP = """\
/reset            forget the conversation
/system TEXT      set the system message (without TEXT: remove it) and forget the conversation
/think, /no_think let the model think before it answers, or not
/thoughts         show what the model thought before its last answer
/fold             show reasoning while it is written, or only how much of it there is
/retry            answer the last question again
/undo             take back the last question and its answer
/set NAME VALUE   temperature, top_p, top_k, min_p, max_tokens, seed (without: show them)
/history          show the conversation
/save FILE        write the conversation as JSON; /load FILE goes on with it
/quit             leave
A line that ends in \\ goes on in the next one; lines between two lines of \"\"\" belong together.
Ctrl-C ends an answer. The arrow keys find earlier lines; what begins with a space is not kept."""
SETTINGS = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")

_COMMAND = re.compile(r"/([a-z_]+)(?:\s+(.*))?", re.DOTALL)


class TerminalChat:
    """One conversation with one model."""

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        *,
        system: str | None = None,
        enable_thinking: bool | None = None,
        history: PromptHistory | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``enable_thinking`` None leaves it to the model; ``clock`` measures the speed shown.

        ``history`` keeps what is typed on a terminal for the next run.
        """
        self._llm, self._params, self._clock = llm, params, clock
        self._history = history
        self._system, self._enable_thinking = system, enable_thinking
        self.turns: list[dict[str, str]] = []
        """User and assistant messages so far."""
        self._commands: dict[str, Callable[[str, Screen, bool], None]] = {
            "reset": self._reset, "system": self._set_system, "think": self._think,
            "no_think": self._do_not_think, "thoughts": self._show_thoughts, "fold": self._fold,
            "retry": self._retry, "undo": self._undo, "set": self._set,
            "history": self._show_history, "save": self._save, "load": self._load,
            "help": lambda rest, screen, interactive: screen.remark(HELP),
        }  # fmt: skip

    def run(self, source: TextIO, out: TextIO) -> int:
        """Talk until /quit or the end of ``source``; returns the exit status.

        On a terminal a failed turn is reported and the conversation goes on; over a pipe its error
        is raised (QnextError), so that a script notices.
        """
        interactive = source.isatty() and out.isatty()
        screen = Screen(out, folds=interactive)
        lines = typed_lines(self._history) if interactive else source
        if interactive:
            screen.remark(f"{self._llm.name}; /help lists the commands, /quit leaves")
        for text in turns(lines):
            self._report_history(screen)
            if _is_quit(text):
                break
            try:
                self._turn(text, screen, interactive)
            except QnextError as error:
                if not interactive:
                    raise
                screen.remark(f"{error} (/reset forgets the conversation)")
        return 0

    def _report_history(self, screen: Screen) -> None:
        if self._history is not None and self._history.trouble is not None:
            screen.remark(self._history.trouble)
            self._history = None  # once is enough

    def _turn(self, text: str, screen: Screen, interactive: bool) -> None:
        command = _COMMAND.fullmatch(text)
        if command is None:
            self._answer(text, screen, interactive)
            return
        name, rest = command.group(1), (command.group(2) or "").strip()
        if name not in self._commands:
            screen.remark(f"there is no command /{name}; /help lists them")
            return
        self._commands[name](rest, screen, interactive)

    # -- commands --------------------------------------------------------------------------------

    def _reset(self, rest: str, screen: Screen, interactive: bool) -> None:
        self.turns.clear()
        screen.remark("the conversation is forgotten")

    def _set_system(self, rest: str, screen: Screen, interactive: bool) -> None:
        self._system = rest or None
        self.turns.clear()
        screen.remark(f"system message: {rest}" if rest else "no system message")

    def _think(self, rest: str, screen: Screen, interactive: bool, *, thinks: bool = True) -> None:
        self._enable_thinking = thinks
        screen.remark("thinking is on" if thinks else "thinking is off")
        if rest:
            self._answer(rest, screen, interactive)

    def _do_not_think(self, rest: str, screen: Screen, interactive: bool) -> None:
        self._think(rest, screen, interactive, thinks=False)

    def _show_thoughts(self, rest: str, screen: Screen, interactive: bool) -> None:
        screen.remark(screen.thoughts.strip() or "there were no thoughts")

    def _fold(self, rest: str, screen: Screen, interactive: bool) -> None:
        screen.folds = not screen.folds
        screen.remark("reasoning is folded" if screen.folds else "reasoning is shown")

    def _retry(self, rest: str, screen: Screen, interactive: bool) -> None:
        if not self.turns:
            screen.remark("there is nothing to answer again")
            return
        question = self.turns[-2]["content"]
        del self.turns[-2:]
        self._answer(question, screen, interactive)

    def _undo(self, rest: str, screen: Screen, interactive: bool) -> None:
        del self.turns[-2:]
        screen.remark(f"{len(self.turns) // 2} questions are left")

    def _set(self, rest: str, screen: Screen, interactive: bool) -> None:
        name, _, value = rest.partition(" ")
        if rest:
            if name not in SETTINGS:
                raise RequestError(f"/set: expected one of {', '.join(SETTINGS)}, found {name!r}.")
            self._params = replace(self._params, **{name: _number(name, value.strip())})
        shown = (f"{one} {getattr(self._params, one)}" for one in SETTINGS)
        screen.remark(", ".join(shown))

    def _show_history(self, rest: str, screen: Screen, interactive: bool) -> None:
        for turn in self.turns:
            screen.remark(f"{turn['role']}: {turn['content']}")

    def _save(self, rest: str, screen: Screen, interactive: bool) -> None:
        kept = {"system": self._system, "messages": self.turns}
        try:
            Path(rest).write_text(json.dumps(kept, ensure_ascii=False, indent=1), encoding="utf-8")
        except OSError as error:
            raise RequestError(f"/save {rest}: {error.strerror}.") from error
        screen.remark(f"{len(self.turns)} messages are in {rest}")

    def _load(self, rest: str, screen: Screen, interactive: bool) -> None:
        try:
            kept = json.loads(Path(rest).read_text(encoding="utf-8"))
        except OSError as error:
            raise RequestError(f"/load {rest}: {error.strerror}.") from error
        except ValueError as error:
            raise RequestError(f"/load {rest}: it is not JSON ({error}).") from error
        self._system, self.turns = _checked(kept, rest)
        screen.remark(f"{len(self.turns)} messages were in {rest}")

    # -- answers ---------------------------------------------------------------------------------

    def _answer(self, text: str, screen: Screen, interactive: bool) -> None:
        system = [{"role": "system", "content": self._system}] if self._system else []
        user = {"role": "user", "content": text}
        screen.begin()
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


def _is_quit(text: str) -> bool:
    return text in ("/quit", "/exit")


def _number(name: str, text: str) -> float | int | None:
    """A setting's value; RequestError for what is no number."""
    if text == "none" and name in ("max_tokens", "seed"):
        return None
    kind = int if name in ("top_k", "max_tokens", "seed") else float
    try:
        return kind(text)
    except ValueError:
        raise RequestError(f"/set {name}: expected a number, found {text!r}.") from None


def _checked(kept: Any, name: str) -> tuple[str | None, list[dict[str, str]]]:
    """The system message and the turns of a file; RequestError for another content."""
    messages = kept.get("messages") if isinstance(kept, dict) else None
    system = kept.get("system") if isinstance(kept, dict) else None
    pairs = [("user", "assistant")[i % 2] for i in range(len(messages or ()))]
    fits = (
        isinstance(messages, list)
        and len(messages) % 2 == 0
        and (system is None or isinstance(system, str))
        and all(
            isinstance(one, dict)
            and set(one) == {"role", "content"}
            and one["role"] == role
            and isinstance(one["content"], str)
            for one, role in zip(messages, pairs, strict=True)
        )
    )
    if not fits:
        raise RequestError(f"/load {name}: expected a file that /save has written.")
    return system, [dict(one) for one in messages or ()]


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
