"""The template engine chat templates run in: what they may call, and how much they may do.

A template comes with a checkpoint and is a program by somebody else. It runs without access to
Python internals, files or other templates, cannot change the messages it is given, and has a budget
of steps, so that it always ends. Memory is bounded only through that budget.
"""

import json
import threading
from collections.abc import Callable, Iterable, Sized
from datetime import datetime
from types import TracebackType
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import LoopControlExtension
from jinja2.filters import sync_do_slice
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qnext.errors import TemplateError

MAX_STEPS = 2_000_000
"""Loop turns of one rendering; a call counts as ten turns, a message takes about a hundred."""
MAX_REPEATED = 1_000_000
"""Longest string or list, and most bits of a number, that ``*`` and ``**`` may give."""

_FILE = "<template>"
_COUNTED = "_counted"

# What Python raises when a template's own arithmetic, look-ups or calls go wrong.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class Refusal(jinja2.TemplateError):
    """Raised by a template through ``raise_exception``."""


class Program:
    """One compiled template.

    ``now`` is the clock behind ``strftime_now``; ``origin`` names the template in messages. Raises
    TemplateError with the line for a template that cannot be compiled.
    """

    def __init__(self, source: str, *, origin: str, now: Callable[[], datetime]) -> None:
        self.origin = origin
        self.environment = _Environment(now)
        try:
            self.syntax: nodes.Template = self.environment.parse(source)
            self._template = self.environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"{origin}, line {error.lineno}: {error.message} (not a valid template)"
            ) from error
        except _TEMPLATE_FAULTS as error:
            raise TemplateError(f"{origin}: {_words(error)} (not a valid template)") from error

    def render(self, variables: dict[str, Any]) -> str:
        """The text for these variables. Raises TemplateError with the template's words and line."""
        self.environment.steps.start()
        try:
            return self._template.render(variables)
        except Refusal as error:
            raise TemplateError(
                f"{self.origin}{_line(error)} refuses these messages: {error.message}"
            ) from error
        except _TEMPLATE_FAULTS as error:
            raise TemplateError(f"{self.origin}{_line(error)} fails: {_words(error)}") from error


class _Steps(threading.local):
    """What the rendering that runs in this thread has left; one environment serves many threads."""

    left = 0

    def start(self) -> None:
        self.left = MAX_STEPS

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise SecurityError(f"more than {MAX_STEPS} steps; the template may never end.")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension])
        self.steps = _Steps()
        del self.globals["lipsum"]  # random text of any length
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: now().strftime(form)
        self.filters["tojson"] = _tojson
        self.filters["slice"] = self._slice
        self.filters[_COUNTED] = self._counted

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        """Send what every loop runs over through ``_counted``."""
        for loop in source.find_all(nodes.For):
            loop.iter = nodes.Filter(
                loop.iter, _COUNTED, [], [], None, None, lineno=loop.lineno, environment=self
            )
        return super()._generate(source, *args, **kwargs)

    # Neither filter uses the context; asking for it keeps them out of compile-time evaluation.
    @pass_context
    def _counted(self, context: Any, items: Iterable[Any]) -> list[Any]:
        turns = list(items)
        self.steps.take(len(turns))
        return turns

    @pass_context
    def _slice(self, context: Any, value: Any, slices: int, fill_with: Any = None) -> Any:
        self.steps.take(max(slices, 0))
        return sync_do_slice(value, slices, fill_with)

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.steps.take(10)
        return super().call(context, called, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        size = _product_size if operator == "*" else _power_size
        if size(left, right) > MAX_REPEATED:
            raise SecurityError(f"the result of {operator} is too large.")
        return super().call_binop(context, operator, left, right)


def _product_size(left: Any, right: Any) -> int:
    """A bound on a product: bits of a number, items of a repeated sequence."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length()
    for sequence, count in ((left, right), (right, left)):
        if isinstance(count, int) and isinstance(sequence, Sized):
            return len(sequence) * max(count, 0)
    return 0


def _power_size(left: Any, right: Any) -> int:
    """A bound on the bits of a power; a float that overflows is Python's own error."""
    both = isinstance(left, int) and isinstance(right, int)
    return left.bit_length() * abs(right) if both else 0


def _raise_exception(message: Any) -> None:
    raise Refusal(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models saw it in training: default separators, key order and non-ASCII text kept.

    Jinja's own filter escapes ``<``, ``>``, ``&`` and quotes for HTML and sorts keys.
    """
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _words(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its macros call each other without end."
    if isinstance(error, jinja2.TemplateError):
        return f"{error.message}"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _line(error: Exception) -> str:
    """``", line 12"``, from the frames that jinja maps back to the template's own lines."""
    trace: TracebackType | None = error.__traceback__
    line = None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _FILE:
            line = trace.tb_lineno
        trace = trace.tb_next
    return "" if line is None else f", line {line}"
