"""What a conversation must look like, checked before a template sees it.

Every error names the place (``messages[2].content``), what was expected and what was found.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qnext.errors import TemplateError

Message = Mapping[str, Any]


def check_messages(
    messages: Sequence[Message], *, parse_arguments: bool = False
) -> list[dict[str, Any]]:
    """Copies of the messages with text parts joined; TemplateError names what is wrong and where.

    A message is a mapping with ``role`` and ``content`` (a string, or a list of parts of type text,
    which are joined without a separator). An assistant message may have ``content`` None or none at
    all beside ``tool_calls`` or ``reasoning_content``. ``parse_arguments`` turns tool-call
    arguments given as JSON text into mappings, for templates that iterate over them.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise TemplateError(f"messages: expected a list of messages, got {kind(messages)}.")
    checked = [
        _check_message(message, f"messages[{index}]", parse_arguments)
        for index, message in enumerate(messages)
    ]
    if not checked:
        raise TemplateError("messages: expected at least one message, got an empty list.")
    return checked


def _check_message(message: Any, where: str, parse_arguments: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TemplateError(
            f"{where}: expected a mapping with role and content, got {kind(message)}."
        )
    checked = dict(message)
    role = checked.get("role")
    if not isinstance(role, str) or not role:
        raise TemplateError(f"{where}.role: expected a non-empty str, got {kind(role)}.")
    reasoning = checked.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise TemplateError(f"{where}.reasoning_content: expected str, got {kind(reasoning)}.")
    calls = checked.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list | tuple):
            raise TemplateError(f"{where}.tool_calls: expected a list, got {kind(calls)}.")
        checked["tool_calls"] = [
            _check_tool_call(call, f"{where}.tool_calls[{index}]", parse_arguments)
            for index, call in enumerate(calls)
        ]
    content = checked.get("content")
    if isinstance(content, list | tuple):
        checked["content"] = _joined_parts(content, f"{where}.content")
    elif not isinstance(content, str) and not (
        content is None and role == "assistant" and (calls or reasoning)
    ):
        raise TemplateError(f"{where}.content: expected str, got {kind(content)}.")
    return checked


def _joined_parts(parts: Sequence[Any], where: str) -> str:
    texts = []
    for index, part in enumerate(parts):
        if not isinstance(part, Mapping):
            raise TemplateError(
                f"{where}[{index}]: expected a mapping with type, got {kind(part)}."
            )
        if part.get("type") != "text":
            raise TemplateError(
                f"{where}[{index}].type: expected 'text', got {part.get('type')!r}. This model "
                "reads text only."
            )
        if not isinstance(part.get("text"), str):
            raise TemplateError(
                f"{where}[{index}].text: expected str, got {kind(part.get('text'))}."
            )
        texts.append(part["text"])
    return "".join(texts)


def _check_tool_call(call: Any, where: str, parse_arguments: bool) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise TemplateError(f"{where}: expected a mapping, got {kind(call)}.")
    checked = dict(call)
    function = checked.get("function")
    if function is not None:
        if not isinstance(function, Mapping):
            raise TemplateError(f"{where}.function: expected a mapping, got {kind(function)}.")
        checked["function"] = _check_function(function, f"{where}.function", parse_arguments)
        return checked
    return _check_function(checked, where, parse_arguments)


def _check_function(function: Mapping[str, Any], where: str, parse: bool) -> dict[str, Any]:
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise TemplateError(f"{where}.name: expected a non-empty str, got {kind(name)}.")
    if not isinstance(arguments, str | Mapping):
        raise TemplateError(
            f"{where}.arguments: expected a mapping or JSON text, got {kind(arguments)}."
        )
    if parse and isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise TemplateError(f"{where}.arguments: not valid JSON ({error}).") from error
        if not isinstance(arguments, dict):
            raise TemplateError(
                f"{where}.arguments: expected a JSON object, got {kind(arguments)}."
            )
    return {**function, "arguments": arguments}


def check_tools(tools: Any) -> None:
    if tools is None:
        return
    if not isinstance(tools, list | tuple):
        raise TemplateError(f"tools: expected a list, got {kind(tools)}.")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise TemplateError(f"tools[{index}]: expected a mapping, got {kind(tool)}.")


def kind(value: Any) -> str:
    return "None" if value is None else "an empty str" if value == "" else type(value).__name__
