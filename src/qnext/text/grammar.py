"""Grammars over token ids: JSON schemas, regular expressions, choices, Lark grammars.

The work is done by llguidance, an optional dependency: it compiles a grammar against a vocabulary
and says after every token which tokens may follow. What it cannot enforce is refused by name when a
grammar is compiled, never ignored.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qnext.errors import RequestError
from qnext.text.tokenizer import Tokenizer

SPACE = r"( ?|\r?\n[ \t]{0,24})"
"""White space between the parts of JSON: what people write, and no more, so that a weak model does
not fill the answer with it."""
KEPT = 64
"""Compiled grammars that are kept."""
OPTIONS = {"whitespace_pattern": SPACE, "lenient": False, "coerce_one_of": False}


def starts_of(tokenizer: Tokenizer, end_ids: Sequence[int]) -> dict[int, int]:
    """By token, the one that is its first byte and nothing else; added tokens have none.

    An end token is nobody's: whether the text may end says nothing about its byte.
    """
    left_out = {*tokenizer.added_tokens.values(), *end_ids}
    left_out.update(tokenizer.undefined_ids(tokenizer.id_limit))
    first: dict[int, int] = {}
    alone: dict[int, int] = {}
    for token in range(tokenizer.id_limit):
        if token in left_out:
            continue
        text = tokenizer.token_bytes(token)
        if text:
            first[token] = text[0]
        if len(text) == 1:
            alone[text[0]] = token
    return {token: alone[byte] for token, byte in first.items() if byte in alone}


class CompiledGrammar:
    """A grammar that is ready to begin; beginning is cheap."""

    def __init__(self, prototype: Any, vocab_size: int, starts: Mapping[int, int]) -> None:
        self._prototype, self._starts = prototype, starts
        self._first = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
        # Every answer begins with this mask; what the library learns by finding it is copied, too.
        problem = GrammarMatcher(prototype, starts).fill(self._first)
        self._knows_first = problem is None

    def begin(self) -> "GrammarMatcher":
        """A matcher before the first token."""
        copy = self._prototype.deep_copy()
        return GrammarMatcher(copy, self._starts, self._first if self._knows_first else None)


class GrammarMatcher:
    """A grammar in the middle of a text."""

    def __init__(
        self, matcher: Any, starts: Mapping[int, int], first: np.ndarray | None = None
    ) -> None:
        """``first`` is the mask before the first token, if it is known."""
        self._matcher, self._starts, self._first = matcher, starts, first

    def fill(self, words: np.ndarray) -> str | None:
        """Write the tokens that may follow, a bit each, into uint32 words.

        Where the text may end the end tokens are among them. Returns why it cannot, if the grammar
        has become too complex to follow.
        """
        if self._first is not None and len(self._first) == len(words):
            words[:] = self._first
            return None
        # words.ctypes would cost as much as many a mask.
        address: int = words.__array_interface__["data"][0]
        self._matcher.unsafe_compute_mask_ptr(address, words.nbytes)
        return self._matcher.get_error() or None

    def knows_mask(self) -> bool:
        """Whether ``fill`` has nothing to find out: before the first token."""
        return self._first is not None

    def consume(self, token: int) -> bool:
        """Go on with a token; False if it may not follow."""
        self._first = None
        return self._matcher.consume_token(token)

    def accepts(self, token: int) -> bool:
        """Whether a token may follow, where no token is certain."""
        return self._matcher.validate_tokens([token]) == 1

    def may_be_forced(self) -> bool:
        """Whether one token only may follow: then the next byte is certain, or it ends here."""
        return bool(self._matcher.compute_ff_bytes()) or self._matcher.is_stopped()

    def start_of(self, token: int) -> int | None:
        """The token that is the first byte of another one and nothing else, if there is one."""
        return self._starts.get(token)

    def may_end(self) -> bool:
        """Whether the text is complete where it stands."""
        return self._matcher.is_accepting()

    def is_over(self) -> bool:
        """Whether the text is complete and cannot go on."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def certain(self) -> tuple[int, ...] | None:
        """Tokens that follow for certain, each the only one of its mask; not always all.

        None where the text ends. No token follows a certain text for certain only where another one
        reaches beyond that text: the library drops what may be spelled in more than one way.
        """
        return None if self._matcher.is_stopped() else tuple(self._matcher.compute_ff_tokens())

    def rollback(self, count: int) -> None:
        """Undo the last ``count`` tokens."""
        self._matcher.rollback(count)


class GrammarCompiler:
    """Compiles grammars for one vocabulary; keeps the last ones."""

    def __init__(self, tokenizer: Tokenizer, *, end_ids: Sequence[int], vocab_size: int) -> None:
        """``vocab_size`` is the number of rows of the model, ``end_ids`` what ends an answer.

        Raises RequestError if llguidance is not installed or there is no end token.
        """
        try:
            import llguidance
        except ModuleNotFoundError as error:
            raise RequestError(
                "structured output and constrained tool calls need llguidance, which is not "
                "installed: pip install 'qnext[structured]'."
            ) from error
        if not end_ids:
            raise RequestError(
                "structured output needs a token that ends an answer, and this checkpoint names "
                "none: set eos_token_id in generation_config.json."
            )
        self._library = llguidance
        self._vocab_size, self._starts = vocab_size, starts_of(tokenizer, end_ids)
        self._vocabulary = llguidance.LLTokenizer(
            tokenizer.serialized(), n_vocab=vocab_size, eos_token=list(end_ids)
        )
        self._kept: OrderedDict[str, CompiledGrammar] = OrderedDict()

    def json_schema(self, schema: Any, *, name: str = "json_schema") -> CompiledGrammar:
        """JSON that a schema accepts; the schema is an object, true or false, or its JSON text.

        Raises RequestError naming a keyword that cannot be enforced.
        """
        return self.lark("start: value\n" + schema_rule("value", schema, name=name), name=name,
                         schema=read_schema(schema, name=name))  # fmt: skip

    def regex(self, pattern: str) -> CompiledGrammar:
        """Text that a regular expression matches as a whole (Rust's syntax, no look-around)."""
        if not isinstance(pattern, str):
            raise RequestError(f"regex: expected a text, found {pattern!r}.")
        return self._compile(self._library.LLMatcher.grammar_from_regex(pattern), "regex")

    def choice(self, choices: Sequence[str]) -> CompiledGrammar:
        """One of some texts."""
        some = [choices] if isinstance(choices, str) else list(choices)
        if not some or any(not isinstance(text, str) or not text for text in some):
            raise RequestError(f"choice: expected texts that are not empty, found {choices!r}.")
        return self.lark("start: " + " | ".join(quoted(text) for text in some), name="choice")

    def lark(self, source: str, *, name: str = "grammar", schema: Any = None) -> CompiledGrammar:
        """A grammar in llguidance's dialect of Lark, beginning with ``start``.

        ``schema`` is what is searched for a keyword that cannot be enforced.
        """
        if not isinstance(source, str):
            raise RequestError(f"{name}: expected a text, found {source!r}.")
        return self._compile(self._library.LLMatcher.grammar_from_lark(source), name, schema)

    def _compile(self, source: str, name: str, schema: Any = None) -> CompiledGrammar:
        found = self._kept.get(source)
        if found is None:
            # Built once: validating it first would build it twice.
            matcher = self._library.LLMatcher(self._vocabulary, source, log_level=0)
            if matcher.is_error():
                raise RequestError(f"{name}: {_explained(matcher.get_error(), schema)}")
            found = self._kept[source] = CompiledGrammar(matcher, self._vocab_size, self._starts)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(source)
        return found


def read_schema(schema: Any, *, name: str = "json_schema") -> Any:
    """A schema as Python objects, from its JSON text too. Raises RequestError if it is none."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (json.JSONDecodeError, RecursionError) as error:
            raise RequestError(f"{name}: not valid JSON: {error}.") from None
    if not isinstance(schema, Mapping | bool):
        raise RequestError(f"{name}: expected an object, true or false, found {schema!r}.")
    return schema


def schema_rule(rule: str, schema: Any, *, name: str) -> str:
    """A Lark rule for JSON that a schema accepts."""
    found = read_schema(schema, name=name)
    if found is True:
        found = {}
    if found is False:
        raise RequestError(f"{name}: the schema false accepts nothing.")
    try:
        text = json.dumps({**found, "x-guidance": OPTIONS})
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{name}: not JSON: {error}.") from None
    return f"{rule}: %json {text}\n"


def quoted(text: str) -> str:
    """A text as a literal of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


_UNSUPPORTED = re.compile(r"Unimplemented keys: \[(.*)\]")


def _explained(problem: str, schema: Any) -> str:
    """What the library complains about, with the place of a keyword it does not know."""
    problem = problem.split("\n<state>")[0].strip().rstrip(".")
    found = _UNSUPPORTED.search(problem)
    if found is None:
        return f"{problem}."
    keywords = re.findall(r'"([^"]*)"', found[1])
    places = [place for place, key in _keys(schema, "$") if key in keywords]
    where = f" (at {', '.join(sorted(places)[:4])})" if places else ""
    plural = "s" if len(keywords) > 1 else ""
    return (
        f"the keyword{plural} {', '.join(keywords)} cannot be enforced{where}; "
        f"leave {'them' if plural else 'it'} out."
    )


def _keys(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield f"{place}.{key}", str(key)
            yield from _keys(inner, f"{place}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _keys(inner, f"{place}[{number}]")
