"""Messages to prompt: the checkpoint's chat template, checked messages, safe encoding.

The engine the template runs in is in ``sandbox.py``; reading the model's answer is in ``parse.py``.
Formats and history rules are those of the Qwen3 family (hybrid, Instruct, Thinking and Coder).
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from jinja2 import nodes

from qnext.errors import TemplateError
from qnext.text.messages import Message, check_messages, check_tools, kind
from qnext.text.output import ToolFormat, tool_format
from qnext.text.sandbox import Program
from qnext.text.tokenizer import Tokenizer
from qnext.text.vocabulary import TOKENIZER_CONFIG, read_json_object

BUILTIN_ORIGIN = "built-in Qwen3 chat template"
_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
_SWITCH = re.compile(r"(?<![\w/])/(no_)?think(?![\w/])")


class ChatTemplate:
    """A chat template, compiled once and usable from several threads."""

    def __init__(
        self,
        source: str,
        *,
        origin: str = "chat template",
        variables: Mapping[str, str] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Compile a jinja template.

        ``variables`` are names every rendering knows (``bos_token`` and the like), ``now`` the
        clock behind ``strftime_now``, ``origin`` the template's name in messages. Raises
        TemplateError with the line if the template is not valid.
        """
        self.source = source
        """The template's text."""
        self.origin = origin
        """Where it came from; ``BUILTIN_ORIGIN`` where a checkpoint has none."""
        self.tool_format: ToolFormat | None = tool_format(source)
        """How the model writes tool calls; None where the template knows no tools."""
        self._variables = dict(variables or {})
        self._program = Program(source, origin=origin, now=now)
        self._wants_mappings = _iterates_arguments(self._program.syntax)

    @classmethod
    def builtin(cls, *, now: Callable[[], datetime] = datetime.now) -> Self:
        """The Qwen3 template with hybrid thinking that comes with this package."""
        return cls(_builtin_source(), origin=BUILTIN_ORIGIN, now=now)

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        name: str = "default",
        now: Callable[[], datetime] = datetime.now,
    ) -> Self:
        """The template of a model folder, or the built-in one if it has none.

        Looked for in ``chat_template.jinja``, ``tokenizer_config.json``, ``chat_template.json``, in
        this order. ``name`` chooses where a file holds several. Raises TemplateError if there is no
        template of that name or it is not valid, TokenizerError if a JSON file is damaged.
        """
        folder = Path(path)
        config_path = folder / TOKENIZER_CONFIG
        config = read_json_object(config_path) if config_path.is_file() else {}
        templates, origin = _find_templates(folder, config)
        if templates and name not in templates:
            raise TemplateError(
                f"{origin}: no template named {name!r}; it has {', '.join(sorted(templates))}."
            )
        if not templates and name != "default":
            raise TemplateError(f"{folder}: no chat template, so none named {name!r} either.")
        return cls(
            templates[name] if templates else _builtin_source(),
            origin=origin,
            variables=_special_names(config),
            now=now,
        )

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        enable_thinking: bool | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt for a conversation.

        ``continue_final_message`` ends the prompt inside the last message, which must be the
        assistant's, so that the model goes on writing it; an unclosed ``<think>`` in it stays open.
        It replaces the generation prompt. ``enable_thinking`` (None: the template's default) and
        further keywords are passed to the template.

        Raises TemplateError: a message is malformed (the text names it, ``messages[2].content``),
        or the template refuses or fails (its own words, and the line).
        """
        checked = check_messages(messages, parse_arguments=self._wants_mappings)
        return self._render(
            checked,
            tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            enable_thinking=enable_thinking,
            **kwargs,
        )

    def _render(
        self,
        checked: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        enable_thinking: bool | None = None,
        **kwargs: Any,
    ) -> str:
        """``render`` of messages that were checked."""
        check_tools(tools)
        if enable_thinking is not None and not isinstance(enable_thinking, bool):
            raise TemplateError(
                f"enable_thinking: expected true, false or nothing, got {enable_thinking!r}."
            )
        if enable_thinking is not None:
            kwargs["enable_thinking"] = enable_thinking
        variables = {**self._variables, **kwargs, "tools": None if tools is None else list(tools)}
        if continue_final_message:
            return self._render_unfinished(checked, variables)
        return self._program.render(
            {**variables, "messages": checked, "add_generation_prompt": add_generation_prompt}
        )

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        guard: Collection[str] = ("user", "tool"),
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """The prompt's token ids, with control tokens only where the template wrote them.

        Messages of the roles in ``guard`` are untrusted: ``<|im_end|>`` in such a message is
        encoded as the characters it is made of, and template rules that look for tags do not see
        it. The text is that of ``render`` otherwise; keywords and errors are the same.
        """
        return self.encode_prompt(messages, tokenizer, guard=guard, tools=tools, **kwargs)[1]

    def encode_prompt(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        guard: Collection[str] = ("user", "tool"),
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> tuple[str, list[int]]:
        """The prompt that ``encode`` encodes, and its ids."""
        checked = check_messages(messages, parse_arguments=self._wants_mappings)
        mark = _unused_character(self.source, checked, tools)
        guarded = [
            {**message, "content": tokenizer.break_up(message["content"], mark)}
            if message["role"] in guard and message.get("content")
            else message
            for message in checked
        ]
        prompt = self._render(guarded, tools, **kwargs)
        if mark not in prompt:
            return prompt, tokenizer.encode(prompt)
        return prompt.replace(mark, ""), tokenizer.encode_guarded(prompt, mark)

    def save(self, path: str | Path) -> None:
        """Write the template as ``chat_template.jinja`` into a model folder."""
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / "chat_template.jinja").write_bytes(self.source.encode("utf-8"))

    def _render_unfinished(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """Render with a mark at the end of the last message and cut there.

        The mark is no whitespace, so a template that trims or rearranges the message moves it
        along.
        """
        last = messages[-1]
        where = f"messages[{len(messages) - 1}]"
        if last["role"] != "assistant":
            raise TemplateError(
                f"continue_final_message: {where}.role: expected assistant, got {last['role']!r}."
            )
        if last.get("tool_calls"):
            raise TemplateError(
                f"continue_final_message: {where}.tool_calls: a message that ends in calls is done."
            )
        content = last.get("content") or ""
        mark = _unused_character(self.source, messages, variables)
        forms = [{**last, "content": content + mark}]
        before, tag, reasoning = content.rpartition("<think>")
        if tag and not before.strip("\n") and "</think>" not in reasoning:
            # Templates only know closed blocks; as a field, the reasoning lands where it belongs.
            reasoning = reasoning.removeprefix("\n")
            forms.insert(0, {**last, "content": "", "reasoning_content": reasoning + mark})
        for form in forms:
            text = self._program.render(
                {**variables, "messages": [*messages[:-1], form], "add_generation_prompt": False}
            )
            if mark in text:
                return text[: text.rindex(mark)]
        raise TemplateError(
            f"continue_final_message: {self.origin} leaves out the text of {where}, so it cannot "
            "be continued."
        )


def opens_thinking(prompt: str) -> bool:
    """Whether the prompt ends inside a think block, so that the model's first words are reasoning.

    Only the turn the prompt ends in counts, and only a block at its start: a tag that somebody
    merely wrote about opens nothing.
    """
    turn_start = prompt.rfind("<|im_start|>")
    if turn_start < 0:
        return prompt.rfind("<think>") > prompt.rfind("</think>")
    _, _, turn = prompt[turn_start:].partition("\n")
    is_open = "<|im_end|>" not in turn and "</think>" not in turn
    return is_open and turn.lstrip().startswith("<think>")


def soft_switch(messages: Sequence[Message]) -> bool | None:
    """What the most recent ``/think`` (True) or ``/no_think`` (False) asks for; None without one.

    System and user messages count. The switches are plain text that hybrid Qwen3 models learned;
    they stay in the prompt, and ``enable_thinking=False`` overrides them.
    """
    for message in reversed(check_messages(messages)):
        if message["role"] in ("system", "user"):
            found = _SWITCH.findall(message["content"])
            if found:
                return not found[-1]
    return None


def _iterates_arguments(syntax: nodes.Template) -> bool:
    """Whether the template walks through tool-call arguments and so needs them as a mapping."""
    filters = (
        node.node for node in syntax.find_all(nodes.Filter) if node.name in ("items", "dictsort")
    )
    methods = (node.node for node in syntax.find_all(nodes.Getattr) if node.attr == "items")
    return any(
        isinstance(node, nodes.Getattr) and node.attr == "arguments"
        for node in (*filters, *methods)
    )


def _builtin_source() -> str:
    return (files("qnext.text") / "templates" / "qwen3.jinja").read_text(encoding="utf-8")


def _find_templates(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Name -> source of what the folder holds, and where that is."""
    jinja_path = folder / "chat_template.jinja"
    if jinja_path.is_file():
        named = {"default": jinja_path}
        named |= {file.stem: file for file in folder.glob("additional_chat_templates/*.jinja")}
        try:
            return {name: file.read_text("utf-8") for name, file in named.items()}, str(jinja_path)
        except UnicodeDecodeError as error:
            raise TemplateError(
                f"{folder}: a chat template is not UTF-8 text ({error})."
            ) from error
    if config.get("chat_template") is not None:
        origin = f"{folder / TOKENIZER_CONFIG}: chat_template"
        return _named_templates(config["chat_template"], origin), origin
    json_path = folder / "chat_template.json"
    if json_path.is_file():
        origin = f"{json_path}: chat_template"
        return _named_templates(read_json_object(json_path).get("chat_template"), origin), origin
    return {}, BUILTIN_ORIGIN


def _named_templates(value: Any, origin: str) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    entries = value if isinstance(value, list) and value else [value]
    templates = {}
    for entry in entries:
        named = entry if isinstance(entry, dict) else {}
        name, source = named.get("name"), named.get("template")
        if not isinstance(name, str) or not isinstance(source, str):
            raise TemplateError(
                f"{origin}: expected a template or a list of objects with name and template, found "
                f"{kind(entry)}."
            )
        templates[name] = source
    return templates


def _special_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name, as templates refer to them."""
    values = {name: config.get(name) for name in _SPECIAL_NAMES}
    plain = {n: v.get("content") if isinstance(v, Mapping) else v for n, v in values.items()}
    return {name: value for name, value in plain.items() if isinstance(value, str)}


def _unused_character(*values: Any) -> str:
    """A private-use character that occurs in none of the values."""
    written = json.dumps(values, ensure_ascii=False, default=str)
    for code in range(0xF0000, 0xFFFFE):
        if chr(code) not in written:
            return chr(code)
    raise TemplateError("messages: they use every private-use character of plane 15.")
