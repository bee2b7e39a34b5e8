"""From what a request asks for to the rules its answer follows: budgets, grammars, tools.

The engine knows token ids, the grammars know text; here the two meet, once per request and before
it is queued. What cannot be enforced is refused here.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qnext.engine.guide import Calls, Rules
from qnext.engine.regions import Regions, Tag
from qnext.engine.request import SamplingParams, StructuredOutputs
from qnext.errors import RequestError
from qnext.text.chat import ChatTemplate, opens_thinking
from qnext.text.grammar import CompiledGrammar, GrammarCompiler
from qnext.text.output import ToolFormat
from qnext.text.parse import STOP_THINKING, THINK_CLOSE, THINK_OPEN, TOOL_CLOSE, TOOL_OPEN
from qnext.text.tokenizer import Tokenizer
from qnext.text.tool_grammar import Tool, call_rules, read_tools

MAX_NEWLINES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolUse:
    """Which tools an answer may call, and how strictly."""

    tools: Sequence[Mapping[str, Any]] = ()
    choice: str | Mapping[str, Any] = "auto"
    """"auto", "none", "required", or ``{"name": ...}`` (OpenAI's wrapped form too)."""
    parallel: bool = True
    """Whether an answer may hold several calls."""
    strict: bool | None = None
    """Whether arguments are bound to the tools' schemas. None leaves that to each tool's own
    ``strict``; a call that is required is always bound."""

    def kind(self) -> Calls:
        """What the answer may do. Raises RequestError for a choice that is none."""
        choice = self.choice
        if not self.tools:
            if choice not in ("auto", "none"):
                raise RequestError(f"tool_choice: {choice!r} needs tools, and none were given.")
            return "free"
        if choice in ("auto", "none", "required"):
            return choice  # type: ignore[return-value]
        self.named()
        return "required"

    def named(self) -> str | None:
        """The one function that must be called; None if any may be."""
        if isinstance(self.choice, str):
            if self.choice in ("auto", "none", "required"):
                return None
        elif isinstance(self.choice, Mapping):
            inner = self.choice.get("function", self.choice)
            name = inner.get("name") if isinstance(inner, Mapping) else None
            if isinstance(name, str):
                return name
        raise RequestError(
            "tool_choice: expected 'auto', 'none', 'required' or {'name': ...}, found "
            f"{self.choice!r}."
        )


class RuleBook:
    """Makes the rules of requests to one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        template: ChatTemplate,
        eos_ids: Sequence[int],
        vocab_size: int,
    ) -> None:
        self.tokenizer, self.eos_ids, self.vocab_size = tokenizer, tuple(eos_ids), vocab_size
        self.thinks = THINK_OPEN in template.source
        self.form: ToolFormat = template.tool_format or "hermes"

    def regions(self, prompt: str, *, chat: bool, plain: bool = False) -> Regions:
        """The regions of an answer to a prompt.

        A conversation's answer may open a think block where its template knows one; a continued
        text may if it is ``plain``: no grammar rules it.
        """
        inside = opens_thinking(prompt)
        turn = prompt[prompt.rfind("<|im_start|>") :]
        think, tool, newlines = self._tags
        has_ids = all(tag.id is not None for tag in (*think, *tool))
        return Regions(
            think=think, tool=tool, newlines=newlines,
            starts_in="reasoning" if inside else "content",
            may_think=(self.thinks and not inside and THINK_CLOSE not in turn) if chat else plain,
            spell=None if has_ids else self.tokenizer.token_bytes,
        )  # fmt: skip

    def tags_in(self, ids: Sequence[int]) -> str:
        """Of a prompt in token ids, the tags that say where its answer starts."""
        texts = {tag.id: tag.text.decode() for tag in self._tags[0]}
        return "".join(texts.get(token, "") for token in ids)

    def rules(
        self, params: SamplingParams, regions: Regions, use: ToolUse | None = None
    ) -> Rules | None:
        """The rules of a request; None where it asks for none.

        Raises RequestError for what cannot be enforced, naming it.
        """
        use = use or ToolUse()
        calls, wanted = use.kind(), params.form
        budget = params.thinking_budget
        plain = calls == "free" or (calls == "auto" and use.parallel and not _binds(use))
        if wanted is None and budget is None and plain:
            return None
        if params.form is not None and calls == "required":
            raise RequestError(
                "structured_outputs with a tool_choice that requires a call: the answer cannot be "
                "both. Leave one of them out."
            )
        opening = regions.tool[0]
        answer = self._answer(wanted) if wanted is not None else None
        call = covers = None
        if calls in ("auto", "required") and (calls == "required" or _binds(use)):
            grammar = self._calls(use, regions, required=calls == "required")
            covers = calls == "required" and opening.id is None
            answer, call = (grammar, None) if covers else (answer, grammar)
        if calls == "none" and opening.id is None:
            raise RequestError(
                f"tool_choice='none' cannot be enforced: this vocabulary has no token {TOOL_OPEN}. "
                "Leave the tools out instead."
            )
        return Rules(
            regions=regions,
            vocab_size=self.vocab_size,
            end_ids=self.eos_ids,
            control_ids=self._control_ids,
            budget=budget,
            stop_thinking=self._stop_thinking if budget is not None else (),
            answer=answer,
            call=call,
            calls=calls,
            parallel=use.parallel,
            covers_calls=bool(covers),
        )

    # -- grammars --------------------------------------------------------------------------------

    @functools.cached_property
    def compiler(self) -> GrammarCompiler:
        """Compiles grammars for this vocabulary; made when first needed."""
        return GrammarCompiler(self.tokenizer, end_ids=self.eos_ids, vocab_size=self.vocab_size)

    def _answer(self, wanted: StructuredOutputs) -> CompiledGrammar:
        if wanted.regex is not None:
            return self.compiler.regex(wanted.regex)
        if wanted.choice is not None:
            return self.compiler.choice(wanted.choice)
        if wanted.grammar is not None:
            return self.compiler.lark(wanted.grammar)
        schema = {"type": "object"} if wanted.json_object else wanted.json_schema
        return self.compiler.json_schema(schema)

    def _calls(self, use: ToolUse, regions: Regions, *, required: bool) -> CompiledGrammar:
        tools: list[Tool] = read_tools(use.tools)
        name = use.named()
        if name is not None:
            tools = [tool for tool in tools if tool.name == name]
            if not tools:
                known = ", ".join(tool.name for tool in read_tools(use.tools))
                raise RequestError(f"tool_choice: no tool is called {name!r}; there are {known}.")
        strict = required if use.strict is None else use.strict
        rules = call_rules(tools, form=self.form, strict=strict)
        opening, closing = regions.tool
        if closing.id is not None and opening.id is not None:
            start = "start: call\n"
        elif required:
            more = f'("\\n"? "{TOOL_OPEN}" call "{TOOL_CLOSE}")*' if use.parallel else ""
            start = f'start: "\\n"? "{TOOL_OPEN}" call "{TOOL_CLOSE}" {more}\n'
        else:
            start = f'start: call "{TOOL_CLOSE}"\n'
        schema = {tool.name: tool.parameters for tool in tools}
        return self.compiler.lark(start + rules, name="tools", schema=schema)

    # -- the vocabulary --------------------------------------------------------------------------

    @functools.cached_property
    def _tags(self) -> tuple[tuple[Tag, Tag], tuple[Tag, Tag], dict[int, int]]:
        think, back, call, end = (
            Tag(text=text.encode(), id=self.tokenizer.added_tokens.get(text))
            for text in (THINK_OPEN, THINK_CLOSE, TOOL_OPEN, TOOL_CLOSE)
        )
        newlines = {}
        for count in range(1, MAX_NEWLINES + 1):
            token = self.tokenizer.id_of("\n" * count)
            if token is not None:
                newlines[token] = count
        return (think, back), (call, end), newlines

    @functools.cached_property
    def _control_ids(self) -> tuple[int, ...]:
        return tuple(sorted(self.tokenizer.added_tokens.values()))

    @functools.cached_property
    def _stop_thinking(self) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(STOP_THINKING))


def _binds(use: ToolUse) -> bool:
    """Whether a call that is made must fit a schema."""
    if use.strict is not None:
        return use.strict
    return any(tool.strict for tool in read_tools(use.tools))
