"""What may stand between ``<tool_call>`` and ``</tool_call>``: grammars from tools' schemas.

Two formats. Hermes: one JSON object with name and arguments. XML: ``<function=NAME>`` around
``<parameter=NAME>`` blocks, whose values are raw text for strings and JSON for everything else.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qnext.errors import RequestError
from qnext.text.grammar import quoted, schema_rule
from qnext.text.output import ToolFormat

ANYTHING = {"type": "object"}
END = "\n</parameter>\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A function the model may call."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool
    """Whether the request marks it as one whose schema binds."""


def read_tools(tools: Sequence[Mapping[str, Any]]) -> list[Tool]:
    """Tools as a request lists them, with the wrapper ``{"type": "function", ...}`` or without.

    Raises RequestError for one without a name.
    """
    found = []
    for number, tool in enumerate(tools):
        inner = tool.get("function", tool)
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if not isinstance(name, str) or not name:
            raise RequestError(f"tools[{number}]: expected a function with a name, found {tool!r}.")
        parameters = inner.get("parameters") or ANYTHING
        if not isinstance(parameters, Mapping):
            raise RequestError(
                f"tools[{number}].parameters: expected a JSON schema, found {parameters!r}."
            )
        strict = bool(inner.get("strict") or tool.get("strict"))
        found.append(Tool(name=name, parameters=parameters, strict=strict))
    return found


def call_rules(tools: Sequence[Tool], *, form: ToolFormat, strict: bool) -> str:
    """Lark rules for one call; the rule ``call`` is what stands between the tags.

    ``strict`` binds every tool to its schema, not only those marked so. Raises RequestError naming
    what of a schema cannot be enforced.
    """
    write = _hermes if form == "hermes" else _xml
    names = " | ".join(f"tool_{i}" for i in range(len(tools)))
    rules = [f'call: "\\n"? ({names}) "\\n"?\n']
    for i, tool in enumerate(tools):
        binding = strict or tool.strict
        rules.append(write(f"tool_{i}", tool, tool.parameters if binding else ANYTHING, binding))
    return "".join(rules)


def _hermes(rule: str, tool: Tool, schema: Mapping[str, Any], binding: bool) -> str:
    place = f"tools: {tool.name}: parameters"
    return (
        f'{rule}: "{{" / ?/ "\\"name\\":" / ?/ {quoted(quoted(tool.name))} "," / ?/ '
        f'"\\"arguments\\":" / ?/ {rule}_arguments "}}"\n'
        + schema_rule(f"{rule}_arguments", schema, name=place)
    )


def _xml(rule: str, tool: Tool, schema: Mapping[str, Any], binding: bool) -> str:
    opening, closing = quoted(f"<function={tool.name}>\n"), quoted("</function>")
    if not binding:
        # Parameters of any name and value.
        return (
            f"{rule}: {opening} {rule}_any* {closing}\n"
            f'{rule}_any: "<parameter=" /[^<>\\n]+/ ">\\n" {rule}_text\n'
            f"{rule}_text[suffix={quoted(END)}]: /(?s:.*)/\n"
        )
    properties = schema.get("properties", {})
    required = set(schema.get("required", ()))
    missing = sorted(required - set(properties))
    if missing:
        raise RequestError(
            f"tools: {tool.name}: required names {missing[0]!r}, which is not among properties."
        )
    parts, rules = [], []
    for i, (name, inner) in enumerate(properties.items()):
        part = f"{rule}_{i}"
        parts.append(part if name in required else f"{part}?")
        place = f"tools: {tool.name}: {name}"
        rules.append(f"{part}: {quoted(f'<parameter={name}>{chr(10)}')} {part}_value\n")
        rules.append(_value(f"{part}_value", inner, schema, place))
    return f"{rule}: {opening} {' '.join(parts)} {closing}\n" + "".join(rules)


def _value(rule: str, schema: Any, root: Mapping[str, Any], place: str) -> str:
    """The value of a parameter and what closes it."""
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    seen = _resolved(schema, root)
    choices = seen.get("enum", [seen["const"]] if "const" in seen else None)
    if choices is not None:
        texts = [one if isinstance(one, str) else _json(one) for one in choices]
        return f"{rule}: ({' | '.join(quoted(text) for text in texts)}) {quoted(END)}\n"
    kinds = _kinds(seen, root)
    if "string" not in kinds:
        return f"{rule}: {rule}_json {quoted(END)}\n" + schema_rule(
            f"{rule}_json",
            {**shared, **(schema if isinstance(schema, Mapping) else {})},
            name=place,
        )
    return f"{rule}[suffix={quoted(END)}]: /{_raw(seen, place)}/\n"


def _raw(schema: Mapping[str, Any], place: str) -> str:
    """A regular expression for a string that is written without quotes."""
    if "format" in schema:
        raise RequestError(
            f"{place}: the keyword format cannot be enforced in text without quotes; leave it out, "
            "or use pattern."
        )
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    pattern = schema.get("pattern")
    if pattern is None:
        return f"(?s:.{{{least},{'' if most is None else most}}})" if least or most else "(?s:.*)"
    if least or most is not None:
        raise RequestError(
            f"{place}: the keyword pattern cannot be enforced together with minLength or maxLength "
            "in text without quotes; put the length into the pattern."
        )
    begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    body = pattern[begins : len(pattern) - ends]
    if ((begins or ends) and "|" in body) or "^" in body.replace("[^", "").replace("\\^", ""):
        raise RequestError(
            f"{place}: the pattern {pattern!r} mixes anchors with alternatives, which cannot be "
            "enforced in text without quotes; put the alternatives into a group of their own field."
        )
    body = body.replace("/", "\\/")
    return f"{'' if begins else '(?s:.*)'}(?:{body}){'' if ends else '(?s:.*)'}"


def _resolved(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema behind local references."""
    for _ in range(32):
        if not isinstance(schema, Mapping):
            return {}
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return schema
        found: Any = root
        for part in reference[2:].split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        schema = found
    return {}


def _kinds(schema: Mapping[str, Any], root: Mapping[str, Any]) -> set[str]:
    """The types a value may have, as far as a schema names them; all if it names none."""
    named = schema.get("type")
    if named is not None:
        return {named} if isinstance(named, str) else set(named)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return set().union(*(_kinds(_resolved(one, root), root) for one in schema[key]))
    if "properties" in schema:
        return {"object"}
    return {"string", "object"}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
