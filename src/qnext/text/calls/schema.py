"""Values of XML parameters as JSON, by the types that a tool's JSON schema declares.

Text is what a model writes between parameter tags; which JSON value it means depends on the schema.
A text that fits none of the declared types stays a string: to refuse it is up to the tool.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qnext.text.calls.scan import MAX_DEPTH, MAX_NUMBER_LENGTH, is_json

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_WHOLE = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.0+)?")
_ALIASES = {
    "str": "string", "text": "string", "int": "integer", "float": "number", "double": "number",
    "bool": "boolean", "dict": "object", "map": "object", "list": "array", "tuple": "array",
}  # fmt: skip
_ANY = frozenset({"integer", "number", "boolean", "object", "array", "null", "string"})
MAX_LITERAL_LENGTH = 20_000
"""Longest text that is tried as a Python literal, in characters."""


def parameters_of(tools: Sequence[Mapping[str, Any]] | None, name: str) -> Mapping[str, Any]:
    """The schema of a tool's arguments; empty when the tool, or its schema, is not declared."""
    for tool in tools or ():
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and function.get("name") == name:
            found = function.get("parameters", function.get("input_schema"))
            return found if isinstance(found, Mapping) else {}
    return {}


def declared(schema: Mapping[str, Any]) -> frozenset[str]:
    """Names of the declared arguments."""
    properties = schema.get("properties")
    return frozenset(properties) if isinstance(properties, Mapping) else frozenset()


def types_of(schema: Mapping[str, Any], key: str) -> frozenset[str]:
    """JSON types an argument may have; an undeclared one is a string."""
    properties = schema.get("properties")
    field = properties.get(key) if isinstance(properties, Mapping) else None
    return _types(field, schema, 0) if isinstance(field, Mapping) else frozenset({"string"})


def as_json(text: str, types: frozenset[str]) -> str:
    """The JSON text of a parameter's value, in the narrowest declared type it fits."""
    word = text.strip()
    lower = word.lower()
    if "null" in types and word in ("null", "None"):
        return "null"
    if "boolean" in types and lower in ("true", "false"):
        return lower
    if len(word) <= MAX_NUMBER_LENGTH and (
        ("integer" in types and _WHOLE.fullmatch(word))
        or ("number" in types and _NUMBER.fullmatch(word))
    ):
        return word
    if ("object" in types and word.startswith("{")) or ("array" in types and word.startswith("[")):
        if is_json(word):
            return word
        converted = _from_python(word)
        if converted is not None:
            return converted
    return json.dumps(text, ensure_ascii=False)


def _types(field: Mapping[str, Any], root: Mapping[str, Any], depth: int) -> frozenset[str]:
    if depth > 8:
        return _ANY  # a reference that leads back to itself
    reference = field.get("$ref")
    if isinstance(reference, str):
        target: Any = root
        for step in reference.removeprefix("#/").split("/"):
            target = target.get(step) if isinstance(target, Mapping) else None
        return _types(target, root, depth + 1) if isinstance(target, Mapping) else _ANY
    for name in ("anyOf", "oneOf"):
        options = field.get(name)
        if isinstance(options, list) and options:
            found = [_types(o, root, depth + 1) for o in options if isinstance(o, Mapping)]
            return frozenset().union(*found) or _ANY
    kind = field.get("type")
    if kind is None:
        values = field.get("enum", [field["const"]] if "const" in field else None)
        if isinstance(values, list) and values:
            return frozenset(_type_of(value) for value in values)
        return frozenset({"string"}) if "allOf" not in field else _ANY
    names = kind if isinstance(kind, list) else [kind]
    plain = {_ALIASES.get(str(one).lower(), str(one).lower()) for one in names}
    if field.get("nullable") is True:
        plain.add("null")
    return frozenset(plain) if plain <= _ANY else _ANY


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    by_type = {str: "string", int: "integer", float: "number", dict: "object", list: "array"}
    return by_type.get(type(value), "string")


def _from_python(text: str) -> str | None:
    """JSON of a list or dict in Python's notation, as some templates show them to the model."""
    if len(text) > MAX_LITERAL_LENGTH or text.count("[") + text.count("{") > MAX_DEPTH:
        return None
    try:
        value = ast.literal_eval(text)
        found = json.dumps(value, ensure_ascii=False, allow_nan=False)
        # Text that cannot be sent (half of a surrogate pair) is refused as well.
        found.encode("utf-8")
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return found if isinstance(value, list | dict) and is_json(found) else None
